"""Steps as Amazon SageMaker jobs, model directories as endpoints. boto3 is imported here and nowhere else."""
