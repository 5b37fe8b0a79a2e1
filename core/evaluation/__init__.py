"""From shards to detections, and from detections to scores."""
