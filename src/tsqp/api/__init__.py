"""The Python API: the model as one object, its configuration, and how the parts are put together."""
