"""A stand-in for AWS on loopback: SageMaker's wire protocol in front of processes that really run."""
