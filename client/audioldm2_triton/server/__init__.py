"""What the stages share; needs the extra `server`. Nothing outside imports it."""
