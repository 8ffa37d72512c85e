"""TFDS builders of data sets that TFDS itself does not have; imported only where one is prepared or read."""
