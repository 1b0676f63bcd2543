"""An HTTP video API for models of this library: `higen serve` (docs/serving.md).

settings   settings of a server             refusals  errors as answers of the API
fields     reads the bodies of requests     asks      checks a body against a model
store      the queue, in SQLite             results   finished videos, in a folder
catalog    loads and frees models           worker    runs jobs, with steps in shared batches
live       progress and previews of jobs    metrics   counts for Prometheus
keys       API keys, hashed                 guard     limits every connection, before any route
schema     schemas of the answers           routes    the endpoints of videos
webpage    the web page: the files of page/
app        the whole application            server    the socket and the process
"""
