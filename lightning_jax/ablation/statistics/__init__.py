"""How sure a difference is: arms by seeds as numbers, without folders and configs."""
