"""What proof forms share whose outcome is an artifact: a short vector, compared with the recomputed one."""
