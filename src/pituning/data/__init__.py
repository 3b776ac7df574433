"""Reading, sampling and checking data."""
