"""Training stages. Each one reads artifacts and writes one artifact."""
