"""The table of docs/scaling.md."""

from benchmarks import scaling

REPORT = {
    "topology": "v5p:2x2x1",
    "chips": 4,
    "mesh": {"data": 1, "fsdp": 4, "expert": 1},
    "programs": {
        "train": {
            "shape": {"stage": "a", "rows": 1024, "seq_len": 8192},
            "fits": True,
            "memory": {"peak": 2**31},
            "collectives": [
                {"bytes": 1.5e9, "in_open_loop": False},
                {"bytes": 9e9, "in_open_loop": True},
            ],
            "roofline": {
                "compute_s": 1.0,
                "hbm_s": 0.5,
                "ici_s": 0.25,
                "exposed_s": 0.125,
                "mfu": 0.5,
                "scheduled_mfu": 0.25,
            },
            "compile": {"wall_s": 61.4},
        }
    },
}


def test_one_line_for_each_program():
    lines = scaling.table([REPORT, REPORT]).splitlines()
    assert len(lines) == 4 and lines[2] == lines[3]
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert len(cells) == len(lines[0].strip("|").split("|"))
    assert cells[:4] == ["v5p:2x2x1", "4", "fsdp 4", "train: rows 1,024 seq_len 8,192"]
    assert cells[4:7] == ["yes", "2.0", "1.5"] and cells[-3:] == ["50.0%", "25.0%", "61"]
