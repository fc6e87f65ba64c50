"""What tests compare with: reference models written without ours, tolerances, ugly shapes. No other room imports it."""
