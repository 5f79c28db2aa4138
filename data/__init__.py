"""Image datasets: from any source to one file, and from that file to batches. Knows no network and imports no torch.

sources/       one module a family of sources: each declares the kinds that it opens
kinds, items   what a kind of source is; what a source is: an ordered list of images with labels
listing, image_files, names, labels, streams, tar_members
               what sources share: which files are images and how they are opened, names, labels, compressed files
decoding, colors, resizing, sizes
               from an opened image to pixels of one mode, color space and size, and to a pyramid of sizes
prepare        builds a dataset: build_plan settles how, build does it with workers, store_writer writes
store          the file itself; encodings: how the pixels of an image become bytes
verify, repair, cache
               check every record, replace bad ones, keep a copy on this machine's own disk
dataset, sampler, loader
               read images, in a shuffled order that is a function of the seed, batch by batch
vectors        a dataset of vectors, which is an .npz as it is
workers        forked processes that share work, or do what might end a process by a signal
errors         what is raised for what a user can mend
"""
