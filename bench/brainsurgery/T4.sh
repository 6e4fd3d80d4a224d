paramend diff inputs/base inputs/ft1 --only 'h.*.mlp.**'
paramend diff inputs/base inputs/ft2 --only 'h.*.mlp.**'
paramend merge inputs/ft1 inputs/ft2 --base inputs/base --how task_arithmetic --weight 0.4 -o out
