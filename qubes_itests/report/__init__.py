"""What a run tells its user: progress, failures, artefacts."""
