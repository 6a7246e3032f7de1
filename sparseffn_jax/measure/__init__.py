"""What a layer costs: FLOPs, time, memory, and the pictures of them."""
