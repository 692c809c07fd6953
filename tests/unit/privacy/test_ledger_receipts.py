"""What others have seen of a ledger: rolled back, replaced, cloned or lost, it does not go on as it was."""

import shutil
from contextlib import closing

import pytest

from lepton_fl.errors import PolicyRefused, VerificationFailed
from lepton_fl.privacy import Ledger, epsilon
from lepton_fl.privacy.ledger import Head, Receipt, Statement, advance, recover
from lepton_fl.privacy.ledger.receipts import from_file, to_bytes
from lepton_fl.secagg.encoding import encode
from lepton_fl.secagg.identity import IdentityKey

DATA = "cards-2026"
DELTA = 1e-5


class Witness:
    """The server, or a peer: it countersigns what it sees, and knows how far each ledger was."""

    def __init__(self, name):
        self.name, self.key, self.known, self.gave = name, IdentityKey.generate(), {}, []

    def see(self, statement):
        seen = self.known.get(statement.ledger)
        self.known[statement.ledger] = advance(seen, statement.head)
        self.gave.append(Receipt.issue(self.key, witness=self.name, statement=statement))
        return self.gave[-1]


@pytest.fixture
def server():
    return Witness("server")


@pytest.fixture
def run_rounds(budget, make_charge):
    """Charge, commit and state rounds of a run; the site keeps the receipts of these witnesses."""

    def run(ledger, rounds, *witnesses, run="r"):
        for round in rounds:
            ledger.charge(make_charge(round, run=run), rounds=1, budget=budget)
            ledger.commit(DATA, run=run, round=round, sha256=bytes(32))
            statement = ledger.state(site="bank", data_set=DATA, run=run, round=round)
            for witness in witnesses:
                receipt = witness.see(Statement.read(statement.signed))
                ledger.keep(Receipt.read(receipt.signed))

    return run


def copy_of(path, name):
    """The whole state folder of a site whose agent does not run."""
    return shutil.copytree(path.parent, path.parent.parent / name) / path.name


def put_back(copy, path):
    shutil.rmtree(path.parent)
    shutil.copytree(copy.parent, path.parent)


def rounds_of(ledger):
    return [(row["run"], row["round"], row["outcome"]) for row in ledger.history(DATA)]


# --- statements and receipts ---


def test_a_statement_says_what_leaves(ledger, run_rounds):
    """The head, and the round's charge without what tells of the data; verified by whoever reads it."""
    run_rounds(ledger, [1])
    made = ledger.state(site="bank", data_set=DATA, run="r", round=1)

    read = Statement.read(made.signed)
    assert (read.site, read.ledger, read.data_set) == ("bank", ledger.key, DATA)
    assert (read.head, read.run, read.round) == (ledger.head(), "r", 1)
    assert read.charge.event == ledger.events(DATA)[0]
    assert read.charge.fingerprint == ""


def test_a_join_states_the_head_alone(ledger):
    """No round leaves with it."""
    made = Statement.read(ledger.state(site="bank", data_set=DATA, run="r").signed)

    assert made.head == Head(1, ledger.head().digest)
    assert made.charge is None


def test_a_round_that_was_not_charged_is_not_stated(ledger):
    """Else a receipt would show what never was."""
    with pytest.raises(PolicyRefused, match="not charged"):
        ledger.state(site="bank", data_set=DATA, run="r", round=1)


@pytest.mark.parametrize("bit", range(0, 8 * 9 * 60, 97))
def test_a_changed_receipt_is_none(ledger, run_rounds, server, bit):
    """Of the statement or of the countersignature."""
    run_rounds(ledger, [1], server)
    signed = bytearray(server.gave[-1].signed)
    signed[bit // 8 % len(signed)] ^= 1 << bit % 8

    with pytest.raises(VerificationFailed):
        Receipt.read(bytes(signed))


def test_receipts_are_a_file(tmp_path, ledger, run_rounds, server):
    """As a witness hands them over."""
    run_rounds(ledger, [1, 2], server)
    file = tmp_path / "receipts"
    file.write_bytes(to_bytes(server.gave))

    assert [one.signed for one in from_file(file)] == [one.signed for one in server.gave]
    file.write_bytes(encode([b"nothing"]))
    with pytest.raises(VerificationFailed, match="malformed"):
        from_file(file)


def test_the_highest_receipt_of_each_witness_is_kept(path, ledger, run_rounds, server):
    """Over a restart; an older one that comes late changes nothing."""
    peer = Witness("hospital")
    run_rounds(ledger, [1], server, peer)
    run_rounds(ledger, [2, 3], server)
    ledger.keep(server.gave[0])
    ledger.close()

    with closing(Ledger(path)) as again:
        kept = {one.witness: one.statement.round for one in again.kept}
    assert kept == {"server": 3, "hospital": 1}
    assert path.with_suffix(".receipts").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("known", "shown"),
    [
        (Head(5, b"a" * 32), Head(4, b"b" * 32)),
        (Head(5, b"a" * 32), Head(5, b"b" * 32)),
        (Head(5, b"a" * 32), Head(1, b"a" * 32)),
    ],
)
def test_a_witness_finds_a_ledger_that_goes_back(known, shown):
    """Behind, or another at the same place."""
    with pytest.raises(VerificationFailed, match="rolled back, or two agents"):
        advance(known, shown)


def test_a_witness_takes_a_ledger_that_goes_on():
    """And one that stands still."""
    head = Head(5, b"a" * 32)

    assert advance(None, head) == advance(head, head) == head
    assert advance(head, Head(6, b"b" * 32)).counter == 6


# --- an agent that must not go on ---


def test_a_state_folder_put_back_is_found_by_a_receipt(path, ledger, run_rounds, server):
    """Database, key and note are all of one time, and agree; only others know better."""
    run_rounds(ledger, [1], server)
    ledger.close()
    old = copy_of(path, "backup")
    with closing(Ledger(path)) as later:
        run_rounds(later, [2], server)
    put_back(old, path)

    with (
        closing(Ledger(path)) as rolled,
        pytest.raises(VerificationFailed, match="ends at entry 3, and server has seen entry 5") as caught,
    ):
        rolled.check(server.gave)
    assert "lepton-fl budget recover" in caught.value.fix


def test_a_folder_put_back_without_its_receipts_does_not_open(path, ledger, run_rounds, server):
    """Where the receipts alone are as new as they were."""
    run_rounds(ledger, [1], server)
    ledger.close()
    old = copy_of(path, "backup")
    with closing(Ledger(path)) as later:
        run_rounds(later, [2], server)
    receipts = path.with_suffix(".receipts").read_bytes()
    put_back(old, path)
    path.with_suffix(".receipts").write_bytes(receipts)

    with pytest.raises(VerificationFailed, match="server has seen entry 5"):
        Ledger(path)


def test_a_ledger_that_was_put_back_and_written_on_is_found(path, ledger, run_rounds, server):
    """It counts as far as the receipts, or further: its digests are others."""
    run_rounds(ledger, [1], server)
    ledger.close()
    old = copy_of(path, "backup")
    with closing(Ledger(path)) as later:
        run_rounds(later, [2], server)
    put_back(old, path)
    with closing(Ledger(path)) as rolled:
        run_rounds(rolled, [3, 4, 5])

        with pytest.raises(VerificationFailed, match="entry 5 is another than server has seen"):
            rolled.check(server.gave)


def test_a_clone_is_found_by_both_sides(path, ledger, run_rounds, server):
    """Two agents on copies of one ledger: whoever comes second, to the witness and by its receipt."""
    run_rounds(ledger, [1], server)
    ledger.close()
    clone = copy_of(path, "clone")
    with closing(Ledger(path)) as first, closing(Ledger(clone)) as second:
        run_rounds(first, [2], server)

        with pytest.raises(VerificationFailed, match="two agents"):
            run_rounds(second, [3], server)
        with pytest.raises(VerificationFailed, match="two agents"):
            second.keep(server.gave[-1])


def test_a_ledger_put_in_anothers_place_is_found(path, ledger, run_rounds, server):
    """A new one, with a key of its own and nothing spent."""
    run_rounds(ledger, [1], server)
    ledger.close()
    shutil.rmtree(path.parent)
    with (
        closing(Ledger(path)) as fresh,
        pytest.raises(VerificationFailed, match="another ledger of this site"),
    ):
        fresh.check(server.gave)


# --- recovery ---


def test_recovery_charges_every_round_that_was_seen(path, ledger, run_rounds, server, open_ledger):
    """Two rounds are in nobody's file any more, and in the peers' receipts: spent >= released again."""
    run_rounds(ledger, [1], server)
    ledger.close()
    old = copy_of(path, "backup")
    with closing(Ledger(path)) as later:
        run_rounds(later, [2, 3], server)
        whole = later.spent(DATA, DELTA)
    put_back(old, path)

    found = recover(path, server.gave, site="bank")

    assert (found.charged, found.lost) == (2, 0)
    again = open_ledger()
    again.check(server.gave)
    assert again.spent(DATA, DELTA) == whole
    assert rounds_of(again) == [("r", 1, "released"), ("r", 2, "recovered"), ("r", 3, "recovered")]
    run_rounds(again, [4], server)


def test_recovery_is_done_once(path, ledger, run_rounds, server, open_ledger):
    """A second time it finds nothing to charge."""
    run_rounds(ledger, [1, 2], server)
    head = ledger.head()
    ledger.close()

    assert recover(path, server.gave, site="bank").charged == 0
    assert open_ledger().head() == head


def test_recovery_knows_no_limit(path, ledger, run_rounds, server, open_ledger, budget):
    """What is out is out; afterwards nothing more fits."""
    old = copy_of(path, "backup")
    run_rounds(ledger, range(1, 11), server)
    ledger.close()
    put_back(old, path)
    with closing(Ledger(path)) as rolled:
        run_rounds(rolled, [1, 2], run="q")

    assert recover(path, server.gave, site="bank").charged == 10
    with closing(Ledger(path)) as again:
        assert again.spent(DATA, DELTA) > budget.epsilon_total


def test_recovery_of_a_lost_ledger(path, ledger, run_rounds, server, open_ledger):
    """All its files are gone; a new one, of another key, begins with what was seen."""
    run_rounds(ledger, [1, 2], server)
    whole = ledger.spent(DATA, DELTA)
    ledger.close()
    shutil.rmtree(path.parent)

    assert recover(path, server.gave, site="bank").charged == 2
    again = open_ledger()
    again.check(server.gave)
    assert again.spent(DATA, DELTA) == whole


@pytest.mark.parametrize("lost", ["", ".head", ".receipts"])
def test_recovery_with_the_key_that_is_left(path, ledger, run_rounds, server, open_ledger, lost):
    """It signs the new chain; the old one's heads are settled."""
    run_rounds(ledger, [1, 2], server)
    ledger.close()
    path.unlink()
    if lost:
        path.with_suffix(lost).unlink()

    assert recover(path, server.gave, site="bank").charged == 2
    again = open_ledger()
    again.check(server.gave)
    assert len(rounds_of(again)) == 2


def test_entries_that_no_receipt_explains_are_a_persons_matter(path, ledger, run_rounds, server, open_ledger):
    """Rounds 2 and 3 went to nobody who gave a receipt; one for round 4 shows that they were."""
    run_rounds(ledger, [1], server)
    ledger.close()
    old = copy_of(path, "backup")
    with closing(Ledger(path)) as later:
        run_rounds(later, [2, 3])
        run_rounds(later, [4], server)
    put_back(old, path)

    with pytest.raises(PolicyRefused, match=r"for 4 entries that were seen.*--accept-loss"):
        recover(path, server.gave, site="bank")
    found = recover(path, server.gave, site="bank", accept_loss=True)
    assert (found.charged, found.lost) == (1, 4)
    assert open_ledger().lost() == 4


def test_nothing_is_recovered_from_nothing(path, ledger, run_rounds):
    """A refused recovery leaves no new ledger behind that would open."""
    run_rounds(ledger, [1])
    ledger.close()
    path.unlink()
    path.with_suffix(".head").unlink()

    with pytest.raises(PolicyRefused, match="nothing shows what was spent"):
        recover(path, [], site="bank")
    with pytest.raises(VerificationFailed):
        Ledger(path)


def test_a_lost_write_ahead_log_is_recovered(path, ledger, run_rounds, server, open_ledger):
    """What `ledger.head` has seen and the database lost."""
    run_rounds(ledger, [1], server)
    ledger._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    run_rounds(ledger, [2], server)
    broken = copy_of(path, "broken")
    broken.with_name("ledger.db-wal").unlink()
    with pytest.raises(VerificationFailed, match="ends at entry 3"):
        Ledger(broken)

    assert recover(broken, [], site="bank").charged == 1
    with closing(Ledger(broken)) as again:
        assert again.spent(DATA, DELTA) == ledger.spent(DATA, DELTA)


def test_a_late_receipt_of_the_lost_branch_is_recovered_too(path, ledger, run_rounds, server):
    """Of a peer who was away when the others were asked."""
    peer = Witness("hospital")
    run_rounds(ledger, [1], server)
    ledger.close()
    old = copy_of(path, "backup")
    with closing(Ledger(path)) as later:
        run_rounds(later, [2], peer)
        run_rounds(later, [3], server)
    put_back(old, path)
    recover(path, server.gave, site="bank", accept_loss=True)

    with closing(Ledger(path)) as again, pytest.raises(VerificationFailed):
        again.check(peer.gave)
    assert recover(path, peer.gave, site="bank", accept_loss=True).charged == 1
    with closing(Ledger(path)) as again:
        again.check([*peer.gave, *server.gave])
        assert sorted(round for _, round, _ in rounds_of(again)) == [1, 2, 3]


def test_recovery_does_not_mend_what_was_changed(path, ledger, run_rounds, server):
    """Only what is missing can be charged anew."""
    run_rounds(ledger, [1], server)
    ledger.close()
    data = bytearray(path.read_bytes())
    at = data.rindex(b"study-s")
    data[at] ^= 1
    path.write_bytes(data)

    with pytest.raises(VerificationFailed, match="entry 2 was changed"):
        recover(path, server.gave, site="bank")


def test_a_recovered_round_is_not_charged_again(path, ledger, run_rounds, server, budget, make_charge):
    """Nor committed: its content has left."""
    run_rounds(ledger, [1], server)
    ledger.close()
    path.unlink()
    recover(path, server.gave, site="bank")
    with closing(Ledger(path)) as again:
        with pytest.raises(PolicyRefused, match="charged before"):
            again.charge(make_charge(1), rounds=1, budget=budget)

        assert again.spent(DATA, DELTA) == epsilon([make_charge().event], DELTA)


def test_a_round_that_two_clones_released_is_charged_twice(path, ledger, run_rounds, server, open_ledger):
    """Each with noise of its own: both have left, and both count."""
    run_rounds(ledger, [1], server)
    ledger.close()
    clone = copy_of(path, "clone")
    peer = Witness("hospital")
    with closing(Ledger(path)) as first, closing(Ledger(clone)) as second:
        run_rounds(first, [2], server)
        run_rounds(second, [2], peer)

    assert recover(path, peer.gave, site="bank").charged == 1
    again = open_ledger()
    again.check([*server.gave, *peer.gave])
    assert [outcome for *_, outcome in rounds_of(again)] == ["released", "released", "recovered"]
    assert again.events(DATA)[0].steps == 3
    again.close()
    assert recover(path, peer.gave, site="bank").charged == 0


def test_another_sites_receipts_recover_nothing(path, ledger, run_rounds, server, tmp_path):
    """A witness may hand over all that it has."""
    run_rounds(ledger, [1], server)
    ledger.close()
    path.unlink()

    with pytest.raises(PolicyRefused):
        recover(path, server.gave, site="ward")
    assert recover(path, server.gave, site="bank").charged == 1
