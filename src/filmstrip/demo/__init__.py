"""Demo: a clip and a checkpoint made on the spot, asked over HTTP."""
