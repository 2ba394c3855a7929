"""What the frontend keeps of answers, for clients that come back to them."""
