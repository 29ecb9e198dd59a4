"""The datasets, one file each. A file's stem is the dataset's name."""
