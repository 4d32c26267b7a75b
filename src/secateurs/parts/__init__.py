"""What methods are made of: masks, patterns, saliency, allocation, schedules, budgets, costs."""
