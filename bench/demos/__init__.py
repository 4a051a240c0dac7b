"""Programs that train something real both ways: with this loss, and as it is done without it."""
