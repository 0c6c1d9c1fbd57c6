"""The tables of scaling, from reports on compiled programs."""

from benchmarks import scaling


def report(chips, step, scheduled):
    time = {"compute_s": step, "hbm_s": 0.1, "ici_s": 0.2, "exposed_s": 0.2, "step_s": step}
    rows = [{"bytes": 3e9, "in_open_loop": False}, {"bytes": 9e9, "in_open_loop": True}]
    train = {
        "shape": {"stage": "a", "rows": 2048},
        "fits": chips > 16,
        "memory": {"peak": 2**30},
        "collectives": rows,
        "roofline": time | {"scheduled_s": scheduled, "mfu": 0.5, "scheduled_mfu": 0.4},
        "compile": {"wall_s": 61.4},
    }
    mesh = {"data": 1, "fsdp": chips}
    return {"topology": "v5p", "chips": chips, "mesh": mesh, "programs": {"train": train}}


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_each_program_is_a_row():
    header, _, row = cells(scaling.table([report(16, 1.0, 1.2)]))
    assert dict(zip(header, row, strict=True)) == {
        "slice": "v5p",
        "chips": "16",
        "mesh": "fsdp 16",
        "program": "train: rows 2,048",
        "fits": "no",
        "peak GiB": "1.0",
        "GB moved": "3",
        "compute ms": "1,000",
        "HBM ms": "100",
        "links ms": "200",
        "exposed ms": "200",
        "MFU": "50.0%",
        "as scheduled": "40.0%",
        "compiled in s": "61",
    }


def test_efficiency_is_that_of_the_fewest_chips():
    reports = [report(64, 0.25, 0.4), report(16, 1.0, 1.2)]
    _, _, first, second = cells(scaling.table(reports, strong=True))
    assert first[1:4] == ["16", "fsdp 16", "no"] and second[1:4] == ["64", "fsdp 64", "yes"]
    assert first[-4:] == ["1,000", "100%", "1,200", "100%"]
    assert second[-4:] == ["250", "100%", "400", "75%"]
