"""Two models in one directory: the first draws a picture, the second makes a clip of it (`higen compose`)."""
