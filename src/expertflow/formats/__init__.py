"""How weights are stored, and how they become numbers.

`dtypes` is the one table of number types. `format` defines a format, `plain` is the format of plain numbers, and
`table` lists the formats there are. `records` lays an expert out. A format's Triton twin, its tile loader, is in
`kernels/reading/tiles.py`. Must not know models, devices and kernels.
"""
