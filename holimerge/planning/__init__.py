"""Planning: which budget, inner merge and number of frames meet a time or a memory, on the device at hand."""
