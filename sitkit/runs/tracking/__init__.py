"""A run in MLflow: the folder is the source, the server is a copy."""
