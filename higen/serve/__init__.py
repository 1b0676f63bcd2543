"""An HTTP video API for models of this library: `higen serve` (docs/serving.md).

settings   what a server was told           refusals  errors as the API answers them
fields     the bodies of requests           asks      a body checked against a model
store      the queue, in SQLite             results   finished videos, in a folder
catalog    models, loaded and freed         worker    runs jobs, their steps in common batches
live       progress and previews of jobs    metrics   counts for Prometheus
keys       API keys, hashed                 guard     limits of every connection, before any route
schema     the answers' shapes              routes    the endpoints
webpage    the web page: the files of page/
app        all of it put together           server    the socket and the process
"""
