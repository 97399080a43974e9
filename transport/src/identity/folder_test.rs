//! Folders as they may be found, and lists of what is revoked as they may come.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::authority::Authority;
use super::folder::{self, CA, CRL, KEY, NODE};
use super::testing::Household;
use super::{Error, Identity, Reloading, Role, revocation};

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).expect("ours");
}

#[test]
fn a_key_that_others_may_read_or_a_folder_that_others_may_write_is_refused() {
    let house = Household::new();
    let folder = house.folder(&house.agent("attic"));
    for (name, wrong, right) in
        [(KEY, 0o640, 0o600), (KEY, 0o604, 0o600), (NODE, 0o666, 0o644), ("", 0o777, 0o700)]
    {
        mode(&folder.join(name), wrong);
        let why = Identity::load(&folder).expect_err(name);
        assert!(matches!(&why, Error::Exposed { mode, .. } if *mode == wrong), "{name}: {why}");
        assert!(why.to_string().contains("chmod"), "{why}");
        mode(&folder.join(name), right);
    }
    Identity::load(&folder).expect("mended");
}

#[test]
fn a_missing_or_damaged_file_is_named() {
    let house = Household::new();
    for name in [CA, NODE, KEY, CRL] {
        let folder = house.folder(&house.agent("attic"));
        let whole = fs::read(folder.join(name)).unwrap();
        fs::remove_file(folder.join(name)).unwrap();
        let why = Identity::load(&folder).unwrap_err();
        assert!(matches!(&why, Error::Missing { file, .. } if *file == name), "{name}: {why}");
        for part in [&whole[..0], &whole[..whole.len() / 2]] {
            fs::write(folder.join(name), part).unwrap();
            mode(&folder.join(name), 0o600);
            let why = Identity::load(&folder).expect_err(name);
            assert!(matches!(&why, Error::Malformed { what, .. } if what.contains(name)), "{name}: {why}");
        }
    }
    let why = Identity::load(&house.path().join("nowhere")).unwrap_err();
    assert!(why.to_string().contains("omega node invite"), "{why}");
}

#[test]
fn files_of_two_identities_are_none() {
    let (house, other) = (Household::new(), Household::new());
    let (one, two) = (house.folder(&house.agent("attic")), house.folder(&house.agent("cellar")));
    let stranger = other.folder(&other.agent("attic"));
    for (name, from) in [(KEY, &two), (NODE, &stranger), (CA, &stranger), (CRL, &stranger)] {
        let own = fs::read(one.join(name)).unwrap();
        fs::copy(from.join(name), one.join(name)).unwrap();
        let why = Identity::load(&one).expect_err(name);
        assert!(matches!(why, Error::Unrelated { .. }), "{name}: {why}");
        fs::write(one.join(name), own).unwrap();
    }
    Identity::load(&one).expect("as it was");
}

#[test]
fn a_replacement_that_was_cut_short_is_finished_or_never_was() {
    let house = Household::new();
    let (old, new) = (house.agent("attic"), house.agent("attic"));
    let folder = house.folder(&old);
    let fresh = house.folder(&new);
    let stage = |count: usize| {
        for name in [CA, NODE, KEY, CRL].into_iter().take(count) {
            fs::copy(fresh.join(name), folder.join(format!("{name}.new"))).unwrap();
        }
    };
    for count in 0..=4 {
        stage(count);
        assert_eq!(Identity::load(&folder).expect("the old one").serial(), old.serial(), "{count} files");
    }
    // All are there, and one has its place already: from here on it is the new one.
    fs::write(folder.join("commit"), b"").unwrap();
    fs::rename(folder.join("node.pem.new"), folder.join(NODE)).unwrap();
    assert_eq!(Identity::load(&folder).expect("finished").serial(), new.serial());
    assert!(!folder.join("commit").exists() && !folder.join("node.key.new").exists());
    assert_eq!(Identity::load(&folder).expect("for good").serial(), new.serial());
}

#[test]
fn only_a_newer_list_that_the_household_signed_is_taken_and_it_is_stored() {
    let (mut house, mut other) = (Household::new(), Household::new());
    let lost = house.console("lost");
    let before = house.crl();
    let folder = house.folder(&house.agent("attic"));
    let handle = Reloading::load(&folder).expect("an identity");
    house.revoke(lost.serial());
    let newer = house.crl();
    let taken = handle.take_crl(&newer).expect("signed");
    assert!(taken.newer && taken.number == 2 && taken.not_stored.is_none(), "{taken:?}");
    assert!(Identity::load(&folder).expect("stored").crl().revokes(lost.serial()));
    assert!(!handle.reload().expect("readable"), "its own change is none");

    for same_or_older in [&newer, &before, &house.crl_numbered(2), &house.crl_numbered(0)] {
        let taken = handle.take_crl(same_or_older).expect("signed");
        assert!(!taken.newer && taken.number == 2, "{taken:?}");
    }
    other.revoke(lost.serial());
    let forged = other.crl_numbered(9);
    assert!(matches!(handle.take_crl(&forged), Err(Error::Unrelated { .. })));
    let signed = house.crl_numbered(9).to_vec();
    for at in 0..signed.len() {
        let mut changed = signed.clone();
        changed[at] ^= 1;
        assert!(handle.take_crl(&changed).is_err(), "byte {at} of {} is covered", signed.len());
    }
    assert!(handle.take_crl(&signed[..signed.len() - 1]).is_err());
    assert!(handle.take_crl(&[signed.clone(), vec![0]].concat()).is_err());
    assert_eq!(handle.current().crl().number(), 2);

    // Somebody puts the old list back into the folder.
    fs::write(folder.join(CRL), folder::text("X509 CRL", &before)).unwrap();
    handle.reload().expect("readable");
    assert!(handle.current().crl().revokes(lost.serial()), "what is known is not forgotten");
    assert!(Identity::load(&folder).expect("whole").crl().revokes(lost.serial()), "nor by a restart");
}

#[test]
fn a_list_that_cannot_be_stored_is_in_force_all_the_same() {
    let mut house = Household::new();
    let lost = house.console("lost");
    let folder = house.folder(&house.agent("attic"));
    let handle = Reloading::load(&folder).expect("an identity");
    fs::remove_dir_all(&folder).unwrap();
    house.revoke(lost.serial());
    let taken = handle.take_crl(&house.crl()).expect("signed");
    assert!(taken.newer && taken.not_stored.is_some(), "{taken:?}");
    assert!(handle.current().crl().revokes(lost.serial()));
    assert!(handle.reload().is_err(), "nothing to load");
    assert!(handle.current().crl().revokes(lost.serial()), "and nothing lost");
}

#[test]
fn a_list_that_could_not_be_stored_is_stored_as_soon_as_that_is_possible() {
    let mut house = Household::new();
    let lost = house.console("lost");
    let folder = house.folder(&house.agent("attic"));
    let handle = Reloading::load(&folder).expect("an identity");
    house.revoke(lost.serial());
    // A folder in the list's place: neither root nor anybody else writes over it.
    let (list, aside) = (folder.join(CRL), folder.join("aside"));
    fs::rename(&list, &aside).unwrap();
    fs::create_dir(&list).unwrap();
    let taken = handle.take_crl(&house.crl()).expect("signed");
    assert!(taken.newer && taken.not_stored.is_some(), "{taken:?}");
    assert!(handle.reload().is_err(), "still not");
    fs::remove_dir(&list).unwrap();
    fs::rename(&aside, &list).unwrap();
    assert!(!Identity::load(&folder).expect("whole").crl().revokes(lost.serial()));
    assert!(!handle.reload().expect("it can be written"), "nothing else is in force");
    assert!(Identity::load(&folder).expect("whole").crl().revokes(lost.serial()), "stored");
}

#[test]
fn whichever_of_two_has_the_newer_list_the_other_learns_it() {
    let mut house = Household::new();
    let (desk, lost) = (Reloading::in_memory(house.console("desk")), house.console("lost"));
    house.revoke(lost.serial());
    let attic = Reloading::in_memory(house.agent("attic"));
    let sent = desk.current().crl().der().to_vec();
    let answer = revocation::answer(&attic, &sent, super::MAX_CRL).expect("signed");
    assert!(!answer.taken.newer);
    assert_eq!(revocation::number(&answer.body), Some(2));
    assert!(desk.take_crl(&answer.payload).expect("signed").newer);
    let answer = revocation::answer(&attic, desk.current().crl().der(), super::MAX_CRL).expect("signed");
    assert!(answer.payload.is_empty(), "both have it");
    for known in [&b""[..], &sent, desk.current().crl().der()] {
        let at_once =
            revocation::answer_at_once(&attic, known, super::MAX_CRL).expect("it needs no signature");
        let answer = revocation::answer(&attic, known, super::MAX_CRL).expect("signed");
        assert_eq!((at_once.body, at_once.payload), (answer.body, answer.payload));
    }
    assert!(revocation::answer_at_once(&attic, b"nonsense", 10).is_none());
    house.revoke(desk.current().serial());
    assert!(revocation::answer_at_once(&attic, &house.crl(), 10).is_none(), "a newer one is to be verified");
    assert!(revocation::answer(&attic, b"", 10).expect("only asks").payload.is_empty(), "no room, no list");
    assert!(revocation::answer(&attic, b"nonsense", 10).is_err());
    assert_eq!(revocation::number(b"short"), None);
}

#[test]
fn a_household_has_one_authority_which_heals_a_list_that_was_not_written() {
    let house = Household::new();
    let folder = house.path().join("ca");
    assert!(matches!(Authority::open(&folder), Err(Error::NoAuthority(_))));
    let authority = Authority::init(&folder, "home").expect("made");
    assert!(matches!(Authority::init(&folder, "home"), Err(Error::AuthorityExists(_))));
    let own = house.path().join("identity");
    authority.make_own(&"desk".parse().unwrap(), Role::Console.into(), &own).expect("made");
    let old = fs::read(folder.join(CRL)).ok();
    let serial = Identity::load(&own).expect("whole").serial().clone();
    assert!(matches!(authority.revoke("nobody"), Err(Error::NoNode(_))));
    assert!(authority.revoke("desk").expect("known").revokes(&serial));
    // The machine stopped between the registry and the list.
    fs::write(folder.join(CRL), old.expect("a list")).unwrap();
    let authority = Authority::open(&folder).expect("opened");
    let crl = authority.crl().expect("made again");
    assert!(crl.revokes(&serial));
    authority.hand_crl_to(&own).expect("stored");
    assert!(Identity::load(&own).expect("whole").crl().revokes(&serial));
    mode(&folder.join("ca.key"), 0o644);
    assert!(matches!(Authority::open(&folder), Err(Error::Exposed { .. })));
}

#[test]
fn the_number_of_a_list_grows_even_if_the_authority_was_put_back_from_an_old_copy() {
    let house = Household::new();
    let (folder, own) = (house.path().join("ca"), house.path().join("identity"));
    let authority = Authority::init(&folder, "home").expect("made");
    authority.make_own(&"desk".parse().unwrap(), Role::Console.into(), &own).expect("made");
    let copies = ["nodes.json", CRL].map(|name| (name, fs::read(folder.join(name)).unwrap()));
    let known = (0..3).map(|_| authority.revoke("desk").expect("known").number()).max().unwrap();
    for (name, copy) in &copies {
        fs::write(folder.join(name), copy).unwrap();
    }
    let before = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let number = authority.revoke("desk").expect("known").number();
    assert!(number > before && number + 3 > known, "{number}, once {known}");
    // The registry alone is old: what its own list names stays revoked, and the number grows.
    fs::write(folder.join("nodes.json"), &copies[0].1).unwrap();
    assert!(authority.revoke("desk").expect("known").number() > number);
}

#[test]
fn a_list_that_forgets_what_was_revoked_is_not_taken_whatever_its_number() {
    let mut house = Household::new();
    let (lost, found) = (house.console("lost"), house.console("found"));
    let attic = Reloading::in_memory(house.agent("attic"));
    let forgetful = house.crl_numbered(9);
    house.revoke(lost.serial());
    assert!(attic.take_crl(&house.crl()).expect("signed").newer);
    let held = attic.current().crl().der().to_vec();
    let answer = revocation::answer(&attic, &forgetful, super::MAX_CRL).expect("signed");
    assert!(answer.taken.conflicting && !answer.taken.newer, "{:?}", answer.taken);
    assert_eq!(answer.payload, held, "the authority learns what it forgot");
    house.revoke(found.serial());
    let same_number = attic.take_crl(&house.crl_numbered(2)).expect("signed");
    assert!(same_number.conflicting && !same_number.newer, "{same_number:?}");
    assert!(attic.take_crl(&house.crl_numbered(10)).expect("signed").newer);
}

#[test]
fn the_authority_speaks_to_agents_without_the_identity_of_its_pc() {
    let house = Household::new();
    let (folder, own) = (house.path().join("ca"), house.path().join("identity"));
    let authority = Authority::init(&folder, "home").expect("made");
    authority.make_own(&"desk".parse().unwrap(), Role::Console.into(), &own).expect("made");
    let desk = Identity::load(&own).expect("whole");
    fs::remove_dir_all(&own).unwrap();
    authority.revoke("desk").expect("known");
    let messenger = authority.messenger().expect("made");
    assert!(messenger.roles().has(Role::Console) && messenger.authority() == desk.authority());
    assert!(messenger.crl().revokes(desk.serial()) && !messenger.crl().revokes(messenger.serial()));
    let left = messenger.expires().duration_since(SystemTime::now()).expect("valid");
    assert!(left <= Duration::from_secs(3600), "{left:?}");
}

#[test]
fn what_root_makes_belongs_to_whoever_owns_the_folder_around_it() {
    use std::os::unix::fs::{MetadataExt, chown};
    if !nix::unistd::Uid::effective().is_root() {
        eprintln!("cannot run: only root makes files for others");
        return;
    }
    let house = Household::new();
    let state = house.path().join("state");
    fs::create_dir(&state).unwrap();
    chown(&state, Some(4711), Some(4712)).unwrap();
    let folder = state.join("identity");
    folder::write(&folder, house.agent("attic").parts()).expect("written");
    for name in ["", CA, NODE, KEY, CRL] {
        let about = fs::metadata(folder.join(name)).unwrap();
        assert_eq!((about.uid(), about.gid()), (4711, 4712), "{name}");
    }
    assert_eq!(fs::metadata(folder.join(KEY)).unwrap().mode() & 0o777, 0o600);
}

#[test]
fn what_root_writes_follows_no_link_out_of_the_folder() {
    use std::os::unix::fs::symlink;
    let house = Household::new();
    let (attic, other) = (house.agent("attic"), house.agent("other"));
    let (folder, elsewhere) = (house.path().join("identity"), house.path().join("elsewhere"));
    fs::create_dir(&elsewhere).unwrap();
    symlink(&elsewhere, &folder).unwrap();
    let refused = [
        folder::write(&folder, attic.parts()),
        folder::write_crl(&folder, &attic.parts().crl),
        folder::try_out(&folder),
        folder::read(&folder).map(drop),
    ];
    for why in refused {
        assert!(matches!(&why, Err(Error::Link(link)) if *link == folder), "{why:?}");
    }
    assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 0);

    // Files that are links are replaced, not written through; and not read.
    fs::remove_file(&folder).unwrap();
    folder::write(&folder, attic.parts()).expect("written");
    let victim = elsewhere.join("victim");
    fs::write(&victim, b"as it was").unwrap();
    for name in ["node.key.new", "commit", "probe", CRL] {
        fs::remove_file(folder.join(name)).ok();
        symlink(&victim, folder.join(name)).unwrap();
    }
    fs::remove_file(folder.join("commit")).unwrap();
    assert!(matches!(Identity::load(&folder), Err(Error::Link(link)) if link == folder.join(CRL)));
    folder::try_out(&folder).expect("it can be written");
    folder::write(&folder, other.parts()).expect("written");
    assert_eq!(Identity::load(&folder).expect("whole").serial(), other.serial());
    assert_eq!(fs::read(&victim).unwrap(), b"as it was");
    assert!(!folder.join(CRL).is_symlink());
}

#[test]
fn a_folder_that_is_open_to_others_is_not_even_finished() {
    let house = Household::new();
    let (old, new) = (house.agent("attic"), house.agent("attic"));
    let (folder, fresh) = (house.folder(&old), house.folder(&new));
    for name in [CA, NODE, KEY, CRL] {
        fs::copy(fresh.join(name), folder.join(format!("{name}.new"))).unwrap();
    }
    fs::write(folder.join("commit"), b"").unwrap();
    mode(&folder, 0o777);
    assert!(matches!(Identity::load(&folder), Err(Error::Exposed { .. })));
    assert!(folder.join("node.key.new").exists(), "others may have put it there");
}

#[test]
fn an_authority_put_back_from_an_old_copy_catches_up_with_what_its_nodes_know() {
    let house = Household::new();
    let (folder, own) = (house.path().join("ca"), house.path().join("identity"));
    let authority = Authority::init(&folder, "home").expect("made");
    let make = |name: &str, own: &Path| {
        authority.make_own(&name.parse().unwrap(), Role::Console.into(), own).expect("made");
        Identity::load(own).expect("whole").serial().clone()
    };
    make("desk", &own);
    let early = make("early", &house.path().join("early"));
    let copies = ["nodes.json", CRL].map(|name| (name, fs::read(folder.join(name)).unwrap()));
    let late = make("late", &house.path().join("late"));
    let known = authority.revoke("late").expect("known");
    let agent = Reloading::load(&own).expect("an identity");
    assert!(agent.take_crl(known.der()).expect("signed").newer);

    for (name, copy) in copies {
        fs::write(folder.join(name), copy).unwrap();
    }
    let forked = authority.revoke("early").expect("known");
    assert!(!forked.revokes(&late));
    let taken = agent.take_crl(forked.der()).expect("signed");
    assert!(taken.conflicting && !taken.newer && agent.current().crl().revokes(&late), "{taken:?}");
    authority.hand_crl_to(&own).expect("caught up");
    let merged = authority.crl().expect("a list");
    assert!(merged.number() > known.number() && merged.revokes(&early) && merged.revokes(&late));
    assert!(agent.take_crl(merged.der()).expect("signed").newer);
    assert!(!authority.catch_up(merged.der()).expect("its own"), "once");
    assert!(!authority.catch_up(known.der()).expect("an older one"));
    let number = authority.crl().expect("a list").number();
    authority.hand_crl_to(&own).expect("nothing to do");
    assert_eq!(authority.crl().expect("a list").number(), number);
}
