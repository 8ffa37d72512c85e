"""Data: random-access sources, the grain pipeline that orders them, and the label rules of sampling.

`prepare` writes a data set once, `sources` opens it (with `catalogue`, which knows the names, and `image_folder`),
`images` brings one record to a network's size and range, `pipeline` turns records into batches whose position is the
training step, `labels` says which label sample i gets.
"""
