"""Forms of data sets of edits, one file each."""
