"""What every `1/model.py` shares: reading tensors, building tensors, per-request errors.

Nothing here imports `triton_python_backend_utils`; the adapters hand it in as `pb_utils`.
"""
