"""Hot loops behind one signature for each back end: the only rooms that ask which back end this is."""
