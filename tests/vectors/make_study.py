"""Writes study.json: one study file, its canonical bytes as Study.canonical defines them, and their digest.

Uses the standard library only, so that it can disagree with lepton_fl. `python tests/vectors/make_study.py`
"""

import hashlib
import json
from pathlib import Path

TOML = """\
# Keys out of order, defaults left out, whole numbers where the study means real ones, text not in NFC.
[train]
sample_rate = 0.05
lr = 1
rounds = 200
expected_batch = 1_000

[privacy]
unit = "customer_id"
delta = 1e-6
epsilon = 3
max_records_per_unit = 8

[evaluation]
cutoff = 2026-01-31T01:00:00+01:00
time_column = "paid"
split = "time"

[study]
name = "card-fraud"
purpose = "re\\u0301sume\\u0301"

[features.columns.mcc]
type = "category"
vocabulary = [5411, "atm", true]

[features.columns.amount]
type = "float"
range = [-0.0, 50000]
transform = "log1p"

[task]
kind = "binary"
target = "is_fraud"
operating_point = { fpr = 0.01 }
"""

# By hand: keys sorted, no white space, every default written out, shortest exact numbers, UTF-8 in NFC.
CANONICAL = (
    "lepton-fl/study/1\n"
    "{"
    '"evaluation":{"cutoff":"2026-01-31T00:00:00+00:00","release":"none","share":null,"split":"time","test_fraction":0.25,'
    '"time_column":"paid"},'
    '"features":{"columns":{'
    '"amount":{"identifier":"refuse","missing":"refuse","range":[0.0,50000.0],"transform":"log1p",'
    '"type":"float"},'
    '"mcc":{"hash":null,"identifier":"refuse","missing":"refuse","type":"category",'
    '"vocabulary":[5411,"atm",true]}},'
    '"scaling":"bounds"},'
    '"model":{"hidden":[32],"name":"auto","normalization":"none"},'
    '"privacy":{"clip":1.0,"delta":1e-06,"epsilon":3.0,"max_records_per_unit":8,"max_sites_per_unit":1,'
    '"noise":"local","unit":"customer_id","unit_gradient":"sum"},'
    '"secure_aggregation":{"colluders":1,"combine":"mean","deadline":60.0,"enabled":true,"group_size":null,'
    '"min_sites":3,"min_survivors":"all","sessions":true,"suite":"LSA1","trim":null},'
    '"study":{"name":"card-fraud","purpose":"r\u00e9sum\u00e9"},'
    '"task":{"kind":"binary","metric":"auc",'
    '"operating_point":{"alerts_per_day":null,"cost_fn":null,"cost_fp":null,"fpr":0.01},'
    '"positive":1,"prevalence":null,"target":"is_fraud"},'
    '"train":{"beta_1":null,"beta_2":null,"deadline":600.0,"early_stopping":null,"expected_batch":1000.0,'
    '"local_steps":1,"lr":1.0,"lr_schedule":"constant","optimizer":"adam","proximal_mu":null,"rounds":200,"sample_rate":0.05,"server_lr":null,'
    '"server_momentum":null,"spare_rounds":null,"strategy":"lockstep","tau":null,"warmup_rounds":0}'
    "}"
)

if __name__ == "__main__":
    vector = {
        "toml": TOML,
        "canonical": CANONICAL,
        "id": hashlib.sha256(CANONICAL.encode("utf-8")).hexdigest(),
    }
    text = json.dumps(vector, indent=1) + "\n"
    Path(__file__).with_name("study.json").write_text(text, encoding="ascii")
