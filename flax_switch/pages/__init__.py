"""Pages in one HTML file, without a network: what reports of runs and pictures of routing share."""
