"""Data: random-access sources, the grain pipeline that orders them, and the label rules of sampling.

`sources` opens a data set, `images` brings one record to a network's size and range, `pipeline` turns records
into batches whose position is the training step, `labels` says which label sample i gets.
"""
