"""A Triton model repository made from a model directory: one model per stage, and `higen`, which runs requests on them.

repository  writes it                    config     its config.pbtxt files, from the stage table
model       the model `higen`            service    what it does, without Triton: requests to streams of events
backend     stages as calls to Triton    interface  the names of what `higen` takes and gives
standin     ONNX Runtime in Python, where Triton's own onnxruntime backend is not installed
server      starts the CPU server of the package nvidia-pytriton
front       its HTTP front                   json_body  checks the bodies of HTTP requests
"""
