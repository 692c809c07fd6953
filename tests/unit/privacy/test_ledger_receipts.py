"""What others have seen of a ledger: rolled back, replaced, cloned or lost, it does not go on as it was."""

import shutil
import sqlite3
from contextlib import closing, contextmanager

import pytest

from lepton_fl.errors import PolicyRefused, Unwritable, VerificationFailed
from lepton_fl.privacy import Ledger, epsilon
from lepton_fl.privacy.ledger import Head, Receipt, Statement, Witness, recover
from lepton_fl.privacy.ledger.audit import audit
from lepton_fl.privacy.ledger.receipts import from_file, to_bytes
from lepton_fl.secagg.encoding import decode, encode
from lepton_fl.secagg.identity import IdentityKey

DATA = "cards-2026"
DELTA = 1e-5


class Giver:
    """A witness on disk, and all receipts that it gave."""

    def __init__(self, witness):
        self.witness, self.gave = witness, []

    def see(self, statement):
        self.witness.see(statement)
        self.gave += self.witness.countersign()
        return self.gave[-1]


@pytest.fixture
def make_witness(tmp_path):
    """A witness of this name; the same file and key when it is made again."""
    keys, made = {}, []

    def make(name):
        key = keys.setdefault(name, IdentityKey.generate())
        made.append(Witness(tmp_path / f"{name}.db", name=name, key=key))
        return Giver(made[-1])

    yield make
    for one in made:
        one.close()


@pytest.fixture
def server(make_witness):
    return make_witness("server")


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


@pytest.fixture
def go_back(path, ledger, run_rounds, server):
    """After a round that the server saw, whatever the block does to the ledger is undone in its folder."""

    @contextmanager
    def run():
        run_rounds(ledger, [1], server)
        ledger.close()
        old = copy_of(path, "backup")
        with closing(Ledger(path)) as later:
            yield later
        put_back(old, path)

    return run


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


def test_the_highest_receipt_of_each_witness_is_kept(path, ledger, run_rounds, server, make_witness):
    """Over a restart; an older one that comes late changes nothing."""
    peer = make_witness("hospital")
    run_rounds(ledger, [1], server, peer)
    run_rounds(ledger, [2, 3], server)
    ledger.keep(server.gave[0])
    ledger.close()

    with closing(Ledger(path)) as again:
        kept = {one.witness: one.statement.round for one in again.kept}
    assert kept == {"server": 3, "hospital": 1}
    assert path.with_suffix(".receipts").stat().st_mode & 0o777 == 0o600


def test_a_witness_that_takes_new_keys_fills_no_disk(path, ledger, run_rounds):
    """A server could name another with each connection."""
    run_rounds(ledger, [1])
    told = ledger.state(site="bank", data_set=DATA)
    for _ in range(20):
        ledger.keep(Receipt.issue(IdentityKey.generate(), witness="the server", statement=told))
    assert len(ledger.kept) == 1
    assert len(from_file(path.with_suffix(".receipts"))) == 1


def test_a_damaged_witness_refuses_no_site(server, make_witness):
    """A bit of the disk is not a ledger that has gone back: the witness's own people are told what to do."""
    server.see(stated(2))
    with sqlite3.connect(server.witness.path) as db:
        (signed,) = db.execute("SELECT signed FROM known").fetchone()
        db.execute("UPDATE known SET signed = ?", (signed[:-1] + bytes([signed[-1] ^ 1]),))
    db.close()
    with pytest.raises(Unwritable, match=r"server\.db.*cannot be used") as found:
        make_witness("server").witness.see(stated(3))
    assert "remove it where it is damaged" in found.value.fix


def test_data_sets_without_end_are_not_remembered(server, monkeypatch):
    """A site may invent them; those that are known are judged as ever."""
    monkeypatch.setattr("lepton_fl.privacy.ledger.witness.MAX_LEDGERS", 3)
    keys = [IdentityKey.generate() for _ in range(9)]
    for number, key in enumerate(keys):
        told = stated(2, key=key, data_set=f"set-{number}")
        if number < 3:
            server.see(told)
            continue
        with pytest.raises(VerificationFailed, match="one more data set"):
            server.see(told)
    assert len(server.witness.highest("bank")) == 3
    server.see(stated(5, key=keys[0], data_set="set-0"))
    with pytest.raises(VerificationFailed, match="rolled back"):
        server.see(stated(4, key=keys[0], data_set="set-0"))


def test_charges_without_end_do_not_fill_a_witness(
    ledger, run_rounds, server, make_witness, make_charge, monkeypatch
):
    """A site that invents them loses its own oldest, and nobody else's."""
    monkeypatch.setattr("lepton_fl.privacy.ledger.witness.MAX_CHARGES", 10)
    run_rounds(ledger, [1], server)
    for number in range(1, 31):
        entry = Head(number, bytes([number]) * 32)
        server.see(
            Statement.issue(
                OTHER,
                site="rogue",
                data_set="x",
                head=entry,
                run="r",
                charge=make_charge(number),
                entry=entry,
            )
        )
        server.see(server.gave[-1].statement)
    for witness in (server.witness, make_witness("server").witness):
        kept = [Statement.read(one).round for one in witness.last("rogue", rounds=99)[:-1]]
        assert kept == list(range(21, 31))
        assert [one.statement.round for one in witness.receipts("bank")] == [1, 1]


LEDGER, OTHER = IdentityKey.generate(), IdentityKey.generate()


def stated(counter, digest=b"a", *, key=LEDGER, data_set=DATA, settled=()):
    """A ledger of the bank's at this head."""
    return Statement.issue(
        key, site="bank", data_set=data_set, head=Head(counter, digest * 32), settled=settled
    )


@pytest.mark.parametrize(
    ("shown", "found"),
    [
        (stated(4, b"b"), "rolled back, or two agents"),
        (stated(5, b"b"), "rolled back, or two agents"),
        (stated(1), "rolled back, or two agents"),
        (stated(9, key=OTHER), "another ledger for data set cards-2026"),
        (stated(4, b"b", settled=[(LEDGER.public, Head(4, b"a" * 32))]), "rolled back"),
        (stated(9, key=OTHER, settled=[(LEDGER.public, Head(4, b"a" * 32))]), "another ledger"),
    ],
)
def test_a_witness_finds_a_ledger_that_goes_back(server, shown, found):
    """Behind, another at the same place, or in its place; also where less was recovered than was seen."""
    server.see(stated(5))

    with pytest.raises(VerificationFailed, match=found):
        server.see(shown)
    assert [one.statement.head.counter for one in server.witness.highest("bank")] == [5]


@pytest.mark.parametrize(
    "shown",
    [
        stated(5),
        stated(6, b"b"),
        stated(9, key=OTHER, data_set="cards-2027"),
        stated(3, b"b", settled=[(LEDGER.public, Head(5, b"a" * 32))]),
        stated(2, key=OTHER, settled=[(LEDGER.public, Head(7, b"a" * 32))]),
    ],
)
def test_a_witness_takes_a_ledger_that_goes_on(server, shown):
    """And one that stands still, one of another data set, and one that was recovered."""
    server.see(stated(5))

    assert server.see(shown).statement == shown


def test_a_witness_that_is_killed_knows_what_it_has_seen(server, make_witness):
    """Before it gave a receipt; its file is opened anew without having been closed."""
    server.witness.see(stated(5))
    again = make_witness("server")

    with pytest.raises(VerificationFailed, match="rolled back"):
        again.see(stated(4, b"b"))
    assert [one.statement.head.counter for one in again.witness.countersign()] == [5]
    assert again.witness.path.stat().st_mode & 0o777 == 0o600


def test_a_witness_gives_a_receipt_for_the_last_of_many(server, path, ledger, run_rounds):
    """One signature for each ledger and time, and every charge is in what it can hand over."""
    run_rounds(ledger, [1, 2, 3])
    for round in (1, 2, 3):
        server.witness.see(ledger.state(site="bank", data_set=DATA, run="r", round=round))

    (given,) = server.witness.countersign()
    assert (given.statement.round, given.witness, given.key) == (3, "server", server.witness.key)
    assert server.witness.countersign() == []
    assert [one.statement.round for one in server.witness.receipts("bank")] == [1, 2, 3, 3]
    assert [Statement.read(one).round for one in server.witness.last("bank", rounds=2)] == [2, 3, 3]
    assert server.witness.receipts("hospital") == []


def test_what_a_refused_ledger_released_is_remembered(path, ledger, run_rounds, server, open_ledger):
    """It has left, so recovery charges it; what is stated again, of a later head, is the same charge."""
    run_rounds(ledger, [1], server)
    ledger.close()
    clone = copy_of(path, "clone")
    with closing(Ledger(path)) as first, closing(Ledger(clone)) as second:
        run_rounds(first, [2, 3], server)
        run_rounds(second, [2])
        late = second.state(site="bank", data_set=DATA, run="r", round=2)
        for statement in (late, second.restate(late)):
            with pytest.raises(VerificationFailed, match="two agents"):
                server.see(statement)

    assert recover(path, server.witness.receipts("bank"), site="bank").charged == 1
    with closing(Ledger(path)) as again:
        assert sorted(rounds_of(again))[1:3] == [("r", 2, "recovered"), ("r", 2, "released")]


def test_a_recovered_ledger_is_taken_by_its_witness(go_back, path, run_rounds, server, open_ledger):
    """Though it has fewer entries than the one that was lost; another older copy is found as before."""
    with go_back() as later:
        run_rounds(later, [2, 3], server)
    recover(path, server.witness.receipts("bank"), site="bank")
    again = open_ledger()
    assert again.head().counter < server.gave[-1].statement.head.counter
    server.see(again.state(site="bank", data_set=DATA))
    run_rounds(again, [4], server)

    assert {one.statement.head for one in again.kept} == {again.head()}
    with (
        closing(Ledger(path.parent.parent / "backup" / path.name)) as rolled,
        pytest.raises(VerificationFailed, match="rolled back"),
    ):
        run_rounds(rolled, [5], server)


def test_what_is_stated_late_is_stated_of_the_head_of_then(ledger, run_rounds):
    """With the same round and charge, so that statements leave in the order of their heads."""
    run_rounds(ledger, [1])
    identity = IdentityKey.generate()
    told = ledger.state(site="bank", data_set=DATA, run="r", round=1, identity=identity)
    assert ledger.restate(told, identity) == told
    run_rounds(ledger, [2])

    late = Statement.read(ledger.restate(told, identity).signed)
    assert late.head == ledger.head() != told.head
    assert (late.round, late.entry, late.charge, late.identity) == (
        1,
        told.entry,
        told.charge,
        identity.public,
    )


@pytest.mark.parametrize("part", [1, 2])
def test_a_statement_has_both_signatures(ledger, part):
    """The ledger's, and that of the site whose it says it is."""
    made = ledger.state(site="bank", data_set=DATA, identity=IdentityKey.generate())
    body, *signatures = decode(made.signed)
    signatures[part - 1] = bytes(64)

    with pytest.raises(VerificationFailed, match="a signature is not its signer's"):
        Statement.read(encode(body, *signatures))


@pytest.mark.parametrize("at", [3, 6, 8, 10])
def test_a_statement_that_contradicts_itself_is_none(at):
    """No entry, a round without a charge, an entry of none, an end that is no end."""
    body = list(decode(stated(5).signed)[0])
    body[at] = {3: 0, 6: 1, 8: 2, 10: [1]}[at]
    signed = encode(body, LEDGER.sign("lepton-fl/ledger-statement/1", *body), b"")

    with pytest.raises(VerificationFailed, match="malformed"):
        Statement.read(signed)


# --- an agent that must not go on ---


def test_a_state_folder_put_back_is_found_by_a_receipt(go_back, path, run_rounds, server):
    """Database, key and note are all of one time, and agree; only others know better."""
    with go_back() as later:
        run_rounds(later, [2], server)

    with (
        closing(Ledger(path)) as rolled,
        pytest.raises(VerificationFailed, match="ends at entry 3, and server has seen entry 5") as caught,
    ):
        rolled.check(server.gave)
    assert "lepton-fl budget recover" in caught.value.fix


def test_a_folder_put_back_without_its_receipts_does_not_open(go_back, path, run_rounds, server):
    """Where the receipts alone are as new as they were."""
    with go_back() as later:
        run_rounds(later, [2], server)
        receipts = path.with_suffix(".receipts").read_bytes()
    path.with_suffix(".receipts").write_bytes(receipts)

    with pytest.raises(VerificationFailed, match="server has seen entry 5"):
        Ledger(path)


def test_a_ledger_that_was_put_back_and_written_on_is_found(go_back, path, run_rounds, server):
    """It counts as far as the receipts, or further: its digests are others."""
    with go_back() as later:
        run_rounds(later, [2], server)
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
    with pytest.raises(VerificationFailed, match="two agents"):
        Ledger(clone)


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


def test_recovery_charges_every_round_that_was_seen(go_back, path, run_rounds, server, open_ledger):
    """Two rounds are in nobody's file any more, and in the peers' receipts: spent >= released again."""
    with go_back() as later:
        run_rounds(later, [2, 3], server)
        whole = later.spent(DATA, DELTA)

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


def test_entries_that_no_receipt_explains_are_a_persons_matter(
    go_back, path, run_rounds, server, open_ledger
):
    """Rounds 2 and 3 went to nobody who gave a receipt; one for round 4 shows that they were."""
    with go_back() as later:
        run_rounds(later, [2, 3])
        run_rounds(later, [4], server)

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


def test_a_late_receipt_of_the_lost_branch_is_recovered_too(go_back, path, run_rounds, server, make_witness):
    """Of a peer who was away when the others were asked."""
    peer = make_witness("hospital")
    with go_back() as later:
        run_rounds(later, [2], peer)
        run_rounds(later, [3], server)
    recover(path, server.gave, site="bank", accept_loss=True)

    with closing(Ledger(path)) as again, pytest.raises(VerificationFailed):
        again.check(peer.gave)
    assert recover(path, peer.gave, site="bank", accept_loss=True).charged == 1
    with closing(Ledger(path)) as again:
        again.check([*peer.gave, *server.gave])
        assert sorted(round for _, round, _ in rounds_of(again)) == [1, 2, 3]


@pytest.mark.parametrize("whole", [True, False])
def test_what_was_stated_before_a_lost_end_stops_nobody_after_a_recovery(
    path, ledger, run_rounds, server, make_witness, open_ledger, whole
):
    """A peer that has kept each statement could have the site recover once more with every one of them."""
    peer = make_witness("hospital")
    run_rounds(ledger, [1], server)
    old = copy_of(path, "backup")
    kept = []
    for round in (2, 3, 4):
        # What is stated of this is of no round, and the witness soon has a later one in its place.
        ledger.release(DATA, study="s", run="r", what=f"figures {round}", charged=False)
        kept.append(peer.see(ledger.state(site="bank", data_set=DATA)))
        run_rounds(ledger, [round], server)
        kept.append(peer.see(ledger.state(site="bank", data_set=DATA, run="r", round=round)))
    ledger.close()
    if whole:
        shutil.rmtree(path.parent)
        path.parent.mkdir()
    else:
        put_back(old, path)
    recover(path, server.gave, site="bank", accept_loss=True)

    again = open_ledger()
    for receipt in kept:
        again.keep(receipt)
    again.close()
    found = recover(path, kept, site="bank")
    assert (found.charged, found.lost) == (0, 0)
    again = open_ledger()
    assert sorted(round for _, round, _ in rounds_of(again)) == [1, 2, 3, 4]
    assert audit(path, given=kept).book.head == again.head()


def test_a_late_charge_of_a_lost_ledger_counts_no_entry_twice(path, ledger, run_rounds, server, open_ledger):
    """Its round is charged, and nobody is asked to accept a loss that was accepted before."""
    run_rounds(ledger, [1, 2, 3, 4], server)
    ledger.close()
    shutil.rmtree(path.parent)
    path.parent.mkdir()
    assert recover(path, server.gave[-1:], site="bank", accept_loss=True).lost

    with closing(Ledger(path)) as again, pytest.raises(VerificationFailed):
        again.check(server.gave[1:2])
    found = recover(path, server.gave[1:2], site="bank")
    assert (found.charged, found.lost) == (1, 0)
    assert sorted(round for _, round, _ in rounds_of(open_ledger())) == [2, 4]


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


def test_a_round_that_two_clones_released_is_charged_twice(
    path, ledger, run_rounds, server, open_ledger, make_witness
):
    """Each with noise of its own: both have left, and both count."""
    run_rounds(ledger, [1], server)
    ledger.close()
    clone = copy_of(path, "clone")
    peer = make_witness("hospital")
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
