"""Active learning as a closed loop: choose structures, label them, fine-tune, judge; resumable at every stage.

config.yaml       what is done; another configuration needs another folder
held/             which validation and test structures are labelled first, at random: before anything is chosen
round-01/         selection/  chosen.json  recipe.yaml  run/  release/  errors.json
report.md, report.json, report.png
"""
