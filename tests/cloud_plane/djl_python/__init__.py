"""The objects of AWS's djl_python that an async handler uses, with their documented behaviour."""
