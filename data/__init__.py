"""COCO data as indexed tar shards, and the streams that read them."""
