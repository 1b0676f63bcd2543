"""Makes many videos from a file of requests, in one process or on a Ray cluster: `higen batch` (docs/bulk.md).

rows    reads and checks the file     places  where results go: a folder or a URL
index   records of finished videos    maker   makes rows with a loaded model
run     one run, from the file to the index; ray_pool: makes the rows on a cluster
"""
