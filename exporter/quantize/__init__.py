"""Numbers from floats: round to nearest, and re-packing what lies on the MXFP4 grid already."""
