"""Many videos from a file of requests, in one process or on a Ray cluster: `higen batch` (docs/bulk.md).

rows    the file, checked        places  where results go: a folder or a URL
index   what has been made       maker   a model that makes rows
run     one run, from the file to the index; ray_pool: the same on a cluster
"""
