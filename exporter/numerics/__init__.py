"""Pure array functions: number formats, packing, rounding. Numpy only, no I/O."""
