"""What tests share: servers, engines, clusters, stocked buckets."""
