"""Pure functions of arrays. No parameters, no config, no mesh axis names.

Axis letters, the same in every file, name and einsum:

    B  batch                 T  query time            S  key time
    D  model width           N  query heads           K  key/value heads
    G  query heads per key/value head (N / K)         H  head size
    R  rotary frequencies (H / 2)
    E  experts               C  choices (slots) per token
    F  expert or MLP hidden  V  vocabulary
    M  tokens (B * T)        U  units (the scanned layers)

An array whose rank matters carries its axes as a suffix: `query_BTNH`. A size is the letter alone.
X stands for axes that do not matter; a module explains further letters that it uses.
"""
