"""Simulated card payments of customers who have many, some of them stolen: no data of anybody.

A customer has habits: how often, how much, where and when. A card that is stolen is used by somebody else for
a while, who mostly shops abroad, online and by night, for amounts that the customer may spend as well. So a
stolen card has several frauds: what one record tells of a customer, the others tell too.
"""

from __future__ import annotations

import numpy as np

PAYMENTS = 12
"""Payments of a customer, on average; the number is geometric, so some have a hundred."""
STOLEN = 0.03
"""Part of the customers whose card is stolen."""
FRAUDS = 0.4
"""Of a stolen card's payments, the part that is fraud."""
MCCS = ("5411", "5541", "5812", "5732", "4111", "5944", "6011", "7995")
"""Food, fuel, restaurants, electronics, transport, jewellery, cash, bets: customers like the first best."""
CHANNELS = ("chip", "contactless", "online", "magstripe")

COLUMNS = f"""
[features.columns.amount]
type = "float"
range = [0, 20000]
transform = "log1p"

[features.columns.hour]
type = "float"
range = [0, 24]

[features.columns.abroad]
type = "float"
range = [0, 1]

[features.columns.mcc]
type = "category"
vocabulary = {list(MCCS)}

[features.columns.channel]
type = "category"
vocabulary = {list(CHANNELS)}
"""
"""What a study says of them: public ranges and code lists."""


def payments(customers: int, rng: np.random.Generator) -> tuple[list[str], list[list[str]]]:
    """Header and rows, in the order of nothing."""
    count_U = rng.geometric(1 / PAYMENTS, customers)
    owner_N = np.repeat(np.arange(customers), count_U)
    rows = len(owner_N)
    fraud_N = (rng.random(customers) < STOLEN)[owner_N] & (rng.random(rows) < FRAUDS)

    def either(thief: np.ndarray, owner: np.ndarray) -> np.ndarray:
        return np.where(fraud_N, thief, owner)

    usual_U = rng.normal(3.4, 0.6, customers)
    amount_N = np.exp(either(rng.normal(4.6, 1.1, rows), rng.normal(usual_U[owner_N], 0.8)))
    hour_N = either(rng.normal(26, 5, rows), rng.normal(15, 4, rows)) % 24
    abroad_N = rng.random(rows) < either(np.full(rows, 0.5), rng.beta(0.3, 4, customers)[owner_N])
    taste = np.geomspace(1, 0.05, len(MCCS))
    mcc_N = either(
        rng.choice(len(MCCS), rows, p=(0.3 + taste[::-1]) / (0.3 + taste).sum()),
        rng.choice(len(MCCS), rows, p=taste / taste.sum()),
    )
    channel_N = either(
        rng.choice(len(CHANNELS), rows, p=[0.1, 0.1, 0.6, 0.2]),
        rng.choice(len(CHANNELS), rows, p=[0.35, 0.4, 0.22, 0.03]),
    )
    header = ["customer_id", "amount", "hour", "abroad", "mcc", "channel", "is_fraud"]
    found = [
        [f"c{u}", f"{a:.2f}", f"{h:.2f}", str(int(b)), MCCS[m], CHANNELS[c], str(int(y))]
        for u, a, h, b, m, c, y in zip(
            owner_N, amount_N, hour_N, abroad_N, mcc_N, channel_N, fraud_N, strict=True
        )
    ]
    return header, [found[n] for n in rng.permutation(rows)]
