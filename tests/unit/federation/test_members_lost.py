"""A cohort that names who is no member any more: nothing is sent, and nobody else is put out."""

from flwr.app import ConfigRecord, Message, RecordDict

from lepton_fl.federation.secure import SecureGrid
from lepton_fl.messages import (
    CONFIG,
    TRAIN,
    Assignment,
    assignment_config,
    refusal_exit_code,
    sits_out,
)
from lepton_fl.simulation.members import memberships

NAMES = {101: "a", 102: "b", 103: "c"}


class Nobody:
    """A grid on which everything that is sent is a failure."""

    def send_and_receive(self, messages, *, timeout=None):
        raise AssertionError("sent")


def test_a_round_with_a_revoked_site_is_given_up_before_anything_is_sent(study):
    """It leaves for good; the others are asked again in the next round."""
    consortium, _ = memberships({party: name for party, name in NAMES.items() if name != "b"})
    config = assignment_config(Assignment(study=study, run="0" * 32, round=1, cohort=("a", "b", "c")))
    asked = [
        Message(RecordDict({CONFIG: ConfigRecord(dict(config))}), dst_node_id=party, message_type=TRAIN)
        for party in NAMES
    ]

    replies = list(SecureGrid(Nobody(), lambda: consortium).send_and_receive(asked))

    assert [reply.metadata.src_node_id for reply in replies] == list(NAMES)
    assert [sits_out(reply) for reply in replies] == [True, False, True]
    assert refusal_exit_code(replies[1]) == 5
    assert "no member of the consortium" in replies[1].error.reason
