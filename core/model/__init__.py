"""What is computed: predictions, losses, detections. It knows no process group, no checkpoint and no DeepSpeed."""
