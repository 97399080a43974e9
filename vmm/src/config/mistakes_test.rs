//! Every mistake that people make in `guest.toml`, and the line that they read.

use std::path::Path;

use super::{Compress, Guest, OnLoss, Peer};

/// `text` in place of what the smallest guest says; each case gives the whole file.
fn lines(text: &str) -> Vec<String> {
    match Guest::parse(Path::new("guest.toml"), text) {
        Ok(_) => Vec::new(),
        Err(mistakes) => mistakes.0.iter().map(ToString::to_string).collect(),
    }
}

const HEAD: &str = "name = 'g'\n[kernel]\nimage = 'vmlinuz'\n";

#[test]
fn each_mistake_names_file_line_column_key_and_mend() {
    let cases: &[(&str, &[&str])] = &[
        ("[cpu]\ncuont = 2\n", &["guest.toml:5:1: key `cpu.cuont`: unknown key; did you mean `count`?"]),
        ("[memry]\nsize = '1G'\n", &["guest.toml:4:2: key `memry`: unknown key; did you mean `memory`?"]),
        (
            "[on]\nboot = 'exit'\nzzz = 1\n",
            &[
                "guest.toml:5:1: key `on.boot`: unknown key; did you mean `reboot`?",
                "guest.toml:6:1: key `on.zzz`: unknown key; valid are `panic`, `reboot`",
            ],
        ),
        ("[cpu]\ncount = 65\n", &["guest.toml:5:1: key `cpu.count`: must be from 1 to 64, not 65"]),
        ("[cpu]\ncount = 0\n", &["guest.toml:5:1: key `cpu.count`: must be from 1 to 64, not 0"]),
        ("[cpu]\ncount = 300\n", &["guest.toml:5:1: key `cpu.count`: must be from 1 to 64, not 300"]),
        ("[cpu]\ncount = '2'\n", &["guest.toml:5:1: key `cpu.count`: must be a whole number, not a text"]),
        (
            "[memory]\nsize = 512\n",
            &["guest.toml:5:1: key `memory.size`: must be a size in quotes, as \"512M\", not a whole number"],
        ),
        (
            "[memory]\nsize = '8 gigs'\n",
            &["guest.toml:5:1: key `memory.size`: `8 gigs` is not a size; write for example `512M` or `8G`"],
        ),
        ("[memory]\nsize = '4K'\n", &["guest.toml:5:1: key `memory.size`: must be from 1M to 8T, not 4K"]),
        (
            "[memory]\nsize = '1048577'\n",
            &["guest.toml:5:1: key `memory.size`: must be a multiple of the page size, 4K; it is 1048577"],
        ),
        (
            "[memory]\nsize = '1G'\nnuma = [{ size = '512M', cpus = [0] }, { size = '256M', cpus = [0, 7] }]\n",
            &[
                "guest.toml:6:1: key `memory.numa`: the nodes' sizes add up to 768M, but `memory.size` is 1G",
                "guest.toml:6:65: key `memory.numa[1].cpus[0]`: vCPU 0 is in `memory.numa[0]` already",
                "guest.toml:6:68: key `memory.numa[1].cpus[1]`: there is no vCPU 7; they are numbered 0 to 0",
            ],
        ),
        (
            "[[disk]]\nserial = 'a'\n",
            &[
                "guest.toml:4:1: key `disk[0]`: needs `path` (an image on this PC) or `remote` (a volume on another)",
            ],
        ),
        (
            "[[disk]]\npath = 'a'\nremote = { agent = 'b', volume = 'c' }\n",
            &["guest.toml:6:1: key `disk[0].remote`: a disk has either `path` or `remote`, not both"],
        ),
        (
            "[[disk]]\npath = 'a'\nserial = 'x'\n[[disk]]\npath = 'b'\nserial = 'x'\n",
            &["guest.toml:9:1: key `disk[1].serial`: `x` is the serial number of `disk[0]` already"],
        ),
        (
            "[[disk]]\npath = 'a'\n[[disk]]\npath = 'a'\nread_only = true\n",
            &["guest.toml:6:1: key `disk[1]`: is the same as `disk[0]`; only read-only disks may share"],
        ),
        (
            "[[disk]]\npath = 'a'\nserial = '123456789012345678901'\n",
            &["guest.toml:6:1: key `disk[0].serial`: must be 1 to 20 bytes long, not 21"],
        ),
        (
            "[[disk]]\nremote = { agent = '::1', volume = 'a/b', on_timeout = 'err', patience = '5' }\n",
            &[
                "guest.toml:5:43: key `disk[0].remote.on_timeout`: unknown value; did you mean `error`?",
                "guest.toml:5:63: key `disk[0].remote.patience`: `5` is not a time; write for example `50ms` or `5s`",
            ],
        ),
        (
            "[[disk]]\nremote = { agent = '::1', volume = 'a/b' }\ndirect = true\n",
            &[
                "guest.toml:5:12: key `disk[0].remote.agent`: is an IPv6 address without brackets; write `host`, `host:port` or `[IPv6 address]:port`",
                "guest.toml:5:27: key `disk[0].remote.volume`: may hold letters, digits, `-`, `_` and `.` only, not '/'",
                "guest.toml:6:1: key `disk[0].direct`: is for local disks; the agent decides it for its volumes",
            ],
        ),
        (
            "[[disk]]\nremote = { agent = 'pc2', volume = 'v', node = 'PC2' }\n",
            &[
                "guest.toml:5:41: key `disk[0].remote.node`: `PC2` is no node's name: lower-case letters, digits and `-`, at most 63",
            ],
        ),
        (
            "[[disk]]\nremote = { agent = 'pc2', volume = 'v', node = 'pc2', insecure = true }\n",
            &[
                "guest.toml:5:41: key `disk[0].remote.node`: nobody proves a name over plain TCP; leave out `insecure`, or this",
            ],
        ),
        (
            "[[disk]]\nremote = { agent = 'pc2', volume = 'v', transport = 'rdma', require_encryption = true }\n",
            &[
                "guest.toml:5:41: key `disk[0].remote.transport`: RDMA does not encrypt what it carries; leave out `require_encryption`, or this",
            ],
        ),
        (
            "[[disk]]\nremote = { agent = 'pc2', volume = 'v', insecure = true, require_encryption = true }\n",
            &[
                "guest.toml:5:58: key `disk[0].remote.require_encryption`: plain TCP is not encrypted; leave out `insecure`, or this",
            ],
        ),
        (
            "[[disk]]\nremote = { agent = 'pc2:99999' }\n",
            &["guest.toml:5:1: key `disk[0].remote.volume`: is missing"],
        ),
        (
            "[[net]]\ntap = 'tap0'\nmac = '52:54:00:12:34'\n[[net]]\ntap = 'tap0'\nmac = '01:00:5e:00:00:01'\n",
            &[
                "guest.toml:6:1: key `net[0].mac`: `52:54:00:12:34` is not a MAC address; write for example `52:54:00:12:34:56`",
                "guest.toml:8:1: key `net[1].tap`: `tap0` is used by `net[0]` already",
                "guest.toml:9:1: key `net[1].mac`: `01:00:5e:00:00:01` is a group's address; the first byte of a card's own is even",
            ],
        ),
        (
            "[[net]]\ntap = 'a-name-that-is-too-long'\nqueues = 17\n",
            &[
                "guest.toml:5:1: key `net[0].tap`: an interface's name is 1 to 15 bytes long, not 23",
                "guest.toml:6:1: key `net[0].queues`: must be from 1 to 16, not 17",
            ],
        ),
        (
            "[balloon]\nsize = '1G'\n",
            &["guest.toml:5:1: key `balloon.size`: is more than the guest's memory, 512M"],
        ),
        (
            "[on]\nreboot = 'stop'\n",
            &["guest.toml:5:1: key `on.reboot`: unknown value; valid are `restart`, `exit`"],
        ),
        ("[cpu]\ncount = \n", &["guest.toml:5:9: string values must be quoted, expected literal string"]),
    ];
    for (tail, expected) in cases {
        assert_eq!(lines(&format!("{HEAD}{tail}")), *expected, "for:\n{tail}");
    }
}

#[test]
fn mistakes_at_the_top_are_found_too() {
    let cases: &[(&str, &[&str])] = &[
        ("name = 'g'\n", &["guest.toml:1:1: key `kernel`: is missing"]),
        (
            "[kernel]\nimages = 'v'\n",
            &[
                "guest.toml:1:1: key `name`: is missing",
                "guest.toml:1:2: key `kernel.image`: is missing",
                "guest.toml:2:1: key `kernel.images`: unknown key; did you mean `image`?",
            ],
        ),
        (
            "name = '../x'\nserial = 'terminl'\nkernel = { image = 'v' }\n",
            &["guest.toml:2:1: key `serial`: unknown value; did you mean `terminal`?"],
        ),
        (
            "name = '../x'\nserial = { file = 1 }\nkernel = { image = 'v' }\n",
            &["guest.toml:2:12: key `serial.file`: must be a text in quotes, not a whole number"],
        ),
        (
            "name = '../x'\nkernel = { image = '' }\n",
            &[
                "guest.toml:1:1: key `name`: may hold letters, digits, `-`, `_` and `.` only, not '/'",
                "guest.toml:2:12: key `kernel.image`: is empty",
            ],
        ),
        ("name = 'g'\nname = 'h'\nkernel = { image = 'v' }\n", &["guest.toml:2:1: duplicate key"]),
    ];
    for (text, expected) in cases {
        assert_eq!(lines(text), *expected, "for:\n{text}");
    }
}

#[test]
fn a_command_line_longer_than_the_kernel_takes_is_refused() {
    let text = format!("name='g'\n[kernel]\nimage='v'\ncmdline='{}'\n", "x".repeat(2048));
    let expected = "guest.toml:4:1: key `kernel.cmdline`: is 2048 bytes long; a kernel takes at most 2047";
    assert_eq!(lines(&text), [expected]);
}

#[test]
fn a_full_configuration_is_read_and_its_paths_are_beside_it() {
    let text = "name = 'desk-1'\nserial = { file = 'log' }\n[kernel]\nimage = 'vmlinuz'\ninitrd = '/boot/i'\n\
        cmdline = 'root=/dev/vda'\n[cpu]\ncount = 4\n[memory]\nsize = '1G'\n\
        numa = [{ size = '512M', cpus = [0, 1] }, { size = '512M', cpus = [2, 3] }]\n\
        [[disk]]\npath = 'a.raw'\ndirect = true\n[[disk]]\n\
        remote = { agent = '[fe80::1]:7420', volume = 'root', patience = '5m', on_timeout = 'error',\
        transport = 'rdma' }\n\
        [[net]]\ntap = 'tap0'\nmac = '52:54:00:12:34:56'\nqueues = 2\n[console]\n[rng]\nenabled = false\n\
        [balloon]\nsize = '256M'\nfree_page_reporting = true\n[on]\nreboot = 'exit'\npanic = 'restart'\n";
    let guest = Guest::parse(Path::new("/g/guest.toml"), text).expect("the configuration is right");
    assert_eq!(guest.kernel.image, Path::new("/g/vmlinuz"));
    assert_eq!(guest.kernel.initrd.as_deref(), Some(Path::new("/boot/i")));
    assert_eq!(guest.disk[0].path.as_deref(), Some(Path::new("/g/a.raw")));
    assert_eq!(guest.serial, super::Serial::File("/g/log".into()));
}

#[test]
fn memory_on_other_pcs_is_named_where_it_cannot_be() {
    let helper = "[[memory.helper]]\nagent = 'pc2'\nsize = '1G'\n";
    let cases: &[(&str, &[&str])] = &[
        (
            "[memory]\non_loss = 'mirror'\nswap_file = 's'\npatience = '1s'\ncompress = 'on'\nhelper = [{ agent = 'a', size = '1G' }]\n",
            &["on_loss", "swap_file", "patience", "compress", "helper"].map(|key| match key {
                "on_loss" => "guest.toml:5:1: key `memory.on_loss`: is for memory on other PCs; say by `local` how much of it stays on this one",
                "swap_file" => "guest.toml:6:1: key `memory.swap_file`: is for memory on other PCs; say by `local` how much of it stays on this one",
                "patience" => "guest.toml:7:1: key `memory.patience`: is for memory on other PCs; say by `local` how much of it stays on this one",
                "compress" => "guest.toml:8:1: key `memory.compress`: is for memory on other PCs; say by `local` how much of it stays on this one",
                _ => "guest.toml:9:1: key `memory.helper`: is for memory on other PCs; say by `local` how much of it stays on this one",
            }),
        ),
        (
            "[memory]\nsize = '1G'\nlocal = '8M'\n",
            &["guest.toml:6:1: key `memory.local`: must be at least 16M, not 8M"],
        ),
        (
            "[memory]\nsize = '1G'\nlocal = '1G'\n",
            &["guest.toml:6:1: key `memory.local`: must be less than `size`, 1G; leave it out for memory on this PC only"],
        ),
        (
            "[memory]\nsize = '1G'\nlocal = '256M'\n",
            &["guest.toml:6:1: key `memory.local`: the rest of the memory must be somewhere; add a `[[memory.helper]]`"],
        ),
        (
            &format!("[memory]\nsize = '1G'\nlocal = '256M'\non_loss = 'mirror'\n{helper}"),
            &["guest.toml:8:10: key `memory.helper`: a mirror has two sides; add another `[[memory.helper]]`"],
        ),
        (
            &format!("[memory]\nsize = '1217M'\nlocal = '256M'\n{helper}"),
            &["guest.toml:7:10: key `memory.helper`: the helpers' sizes add up to 1G; 1025M must have room: what is not on this PC, and a quarter of `local` (512M at most) for pages on their way"],
        ),
        (
            &format!("[memory]\nsize = '1G'\nlocal = '256M'\non_loss = 'mirror'\n{helper}[[memory.helper]]\nagent = 'pc3'\nsize = '831M'\n"),
            &["guest.toml:8:10: key `memory.helper`: the helpers' sizes add up to 1855M; two of them must have 832M each, or all but the largest twice that: what is not on this PC, and a quarter of `local` (512M at most) for pages on their way"],
        ),
        (
            &format!("[memory]\nsize = '1G'\nlocal = '256M'\non_loss = 'local-disk'\n{helper}"),
            &["guest.toml:7:1: key `memory.on_loss`: `local-disk` needs `swap_file`, the path of a file that does not exist yet"],
        ),
        (
            &format!("[memory]\nsize = '1G'\nlocal = '256M'\nswap_file = 's'\n{helper}{helper}insecure = true\nnode = 'x'\n"),
            &[
                "guest.toml:7:1: key `memory.swap_file`: is for `on_loss = \"local-disk\"` only",
                "guest.toml:12:1: key `memory.helper[1].agent`: `pc2` is a helper already; give it a larger `size`",
                "guest.toml:15:1: key `memory.helper[1].node`: nobody proves a name over plain TCP; leave out `insecure`, or this",
            ],
        ),
        (
            "[memory]\nsize = '1G'\nlocal = '256M'\n[[memory.helper]]\nagent = 'pc2'\nsize = '1M'\n",
            &["guest.toml:9:1: key `memory.helper[0].size`: must be at least 16M, a piece of this guest's memory, not 1M"],
        ),
    ];
    for (tail, expected) in cases {
        assert_eq!(lines(&format!("{HEAD}{tail}")), *expected, "for:\n{tail}");
    }
}

#[test]
fn helpers_need_no_room_for_what_is_on_this_pc() {
    let text = format!(
        "{HEAD}[memory]\nsize = '32G'\nlocal = '8G'\n[[memory.helper]]\nagent = 'pc2'\nsize = '12800M'\n\
         [[memory.helper]]\nagent = 'pc3'\nsize = '12G'\n"
    );
    assert!(Guest::parse(Path::new("/g/guest.toml"), &text).is_ok());
}

#[test]
fn memory_on_other_pcs_is_read_and_its_swap_file_is_beside_the_configuration() {
    let text = format!(
        "{HEAD}[memory]\nsize = '1G'\nlocal = '256M'\non_loss = 'local-disk'\nswap_file = 'swap'\npatience = '5s'\n\
         compress = 'off'\n\
         [[memory.helper]]\nagent = 'pc2'\nsize = '1G'\ntransport = 'rdma'\n[[memory.helper]]\nagent = '10.0.0.3'\n\
         size = '512M'\nnode = 'attic'\nrequire_encryption = true\n"
    );
    let memory = Guest::parse(Path::new("/g/guest.toml"), &text).expect("the configuration is right").memory;
    assert_eq!((memory.on_loss, memory.helper.len()), (OnLoss::LocalDisk, 2));
    assert_eq!(memory.compress, Compress::Off);
    assert_eq!(memory.swap_file.as_deref(), Some(Path::new("/g/swap")));
    assert_eq!(Peer::from(&memory.helper[1]).expected_node().as_deref(), Some("attic"));
    assert_eq!(Peer::from(&memory.helper[0]).expected_node().as_deref(), Some("pc2"));
}

#[test]
fn any_text_is_read_or_refused_with_a_reason() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    runner
        .run(&"(name|kernel|disk|=|\\[|\\]|\\{|\\}|\n|'g'|image|1|\"|,|\\.|\\PC){0,40}", |text| {
            if let Err(mistakes) = Guest::parse(Path::new("g"), &text) {
                proptest::prop_assert!(!mistakes.0.is_empty());
                for mistake in mistakes.0 {
                    proptest::prop_assert!(!mistake.what.is_empty() && mistake.position.is_some());
                }
            }
            Ok(())
        })
        .expect("no text breaks the reader");
}

#[test]
fn a_host_name_is_the_node_that_is_expected_and_an_address_is_any() {
    for (agent, node, here) in [
        ("attic", Some("attic"), false),
        ("Attic:99", Some("attic"), false),
        ("attic.lan", None, false),
        ("192.168.1.20:7420", None, false),
        ("[fe80::1]:7420", None, false),
        ("localhost", None, true),
        ("127.0.0.2:99", None, true),
        ("[::1]", None, true),
    ] {
        let text = format!("{HEAD}[[disk]]\nremote = {{ agent = '{agent}', volume = 'v' }}\n");
        let guest = Guest::parse(Path::new("g.toml"), &text).expect("valid");
        let remote: Peer<'_> = guest.disk[0].remote.as_ref().expect("remote").into();
        assert_eq!((remote.expected_node().as_deref(), remote.is_on_this_pc()), (node, here), "{agent}");
    }
    let text = format!("{HEAD}[[disk]]\nremote = {{ agent = '10.0.0.2', volume = 'v', node = 'attic' }}\n");
    let guest = Guest::parse(Path::new("g.toml"), &text).expect("valid");
    let remote: Peer<'_> = guest.disk[0].remote.as_ref().expect("remote").into();
    assert_eq!(remote.expected_node().as_deref(), Some("attic"));
}

#[test]
fn vcpus_on_other_pcs_are_named_where_they_cannot_be() {
    let attic = "[[cpu.place]]\nnode = 'attic'\ncount = 1\n";
    let cases: &[(&str, &[&str])] = &[
        (
            attic,
            &[
                "guest.toml:4:7: key `cpu.place`: 1 of the guest's 1 vCPUs would be elsewhere; the first one stays on this PC, so raise `cpu.count` or lower this",
            ],
        ),
        (
            "[cpu]\ncount = 4\nplace = [{ node = 'attic', count = 0 }]\n",
            &["guest.toml:6:28: key `cpu.place[0].count`: must be from 1 to 63, not 0"],
        ),
        (
            "[cpu]\ncount = 4\nplace = [{ node = 'console', count = 2, room = 1 }]\n",
            &[
                "guest.toml:6:12: key `cpu.place[0].node`: `console` is the PC that runs the guest's devices; give this one another name",
                "guest.toml:6:41: key `cpu.place[0].room`: must be from `count`, which is 2, to 63",
            ],
        ),
        (
            &format!("[cpu]\ncount = 4\n{attic}{attic}"),
            &[
                "guest.toml:10:1: key `cpu.place[1].node`: `attic` is a place already; give it a larger `count`",
            ],
        ),
        (
            &format!(
                "[cpu]\ncount = 4\n{attic}agent = '10.0.0.2'\n[[cpu.place]]\nnode = 'loft'\nagent = '10.0.0.2'\ncount = 1\n"
            ),
            &["guest.toml:12:1: key `cpu.place[1].agent`: `10.0.0.2` is another place's agent already"],
        ),
        (
            "[cpu]\ncount = 2\nplace = [{ node = 'Attic', agent = 'a b', count = 1, transport = 'rdma', require_encryption = true, patience = '0s' }]\n",
            &[
                "guest.toml:6:12: key `cpu.place[0].node`: `Attic` is no node's name: lower-case letters, digits and `-`, at most 63",
                "guest.toml:6:28: key `cpu.place[0].agent`: is not a host; write `host`, `host:port` or `[IPv6 address]:port`",
                "guest.toml:6:54: key `cpu.place[0].transport`: RDMA does not encrypt what it carries; leave out `require_encryption`, or this",
                "guest.toml:6:101: key `cpu.place[0].patience`: must be longer than nothing; leave it out to wait for ever",
            ],
        ),
        (
            &format!(
                "[cpu]\ncount = 2\n{attic}[memory]\nsize = '1G'\nlocal = '256M'\n[[memory.helper]]\nagent = 'pc2'\nsize = '1G'\n[balloon]\n"
            ),
            &[
                "guest.toml:11:1: key `memory.local`: a guest has vCPUs on other PCs (`[[cpu.place]]`) or memory on other PCs, not both in this version; leave out one of them",
                "guest.toml:15:2: key `balloon`: the RAM of a guest with vCPUs on other PCs cannot be given back in this version; leave this out",
            ],
        ),
        (
            &format!(
                "[cpu]\ncount = 2\n{attic}[memory]\nsize = '65G'\nnuma = [{{ size = '65G', cpus = [0, 1] }}]\n"
            ),
            &[
                "guest.toml:10:1: key `memory.size`: is 65G; each PC that runs vCPUs of a guest has room for all of its RAM, 64G at most in this version",
                "guest.toml:11:1: key `memory.numa`: with `[[cpu.place]]` the PCs are the NUMA nodes; leave this out",
            ],
        ),
    ];
    for (tail, expected) in cases {
        assert_eq!(lines(&format!("{HEAD}{tail}")), *expected, "for:\n{tail}");
    }
}

#[test]
fn the_first_vcpus_are_on_this_pc_and_the_last_ones_elsewhere() {
    let text = format!("{HEAD}[cpu]\ncount = 5\n[[cpu.place]]\nnode = 'attic'\ncount = 2\n");
    let guest = Guest::parse(Path::new("/g/guest.toml"), &text).expect("the configuration is right");
    let placement = guest.placement();
    let numbers: Vec<u8> = placement.members().iter().map(|member| member.number()).collect();
    assert_eq!((numbers.as_slice(), placement.counts().as_slice()), (&[0, 0, 0, 1, 1][..], &[3, 2][..]));
    let helper = placement.members()[4];
    assert_eq!(placement.cpus_of(helper).collect::<Vec<_>>(), [3, 4]);
    assert!(placement.spans());
    let alone =
        Guest::parse(Path::new("/g/guest.toml"), &format!("{HEAD}[cpu]\ncount = 3\n")).expect("valid");
    assert!(!alone.placement().spans());
    assert_eq!(alone.placement().counts(), [3]);
}

#[test]
fn a_place_is_reached_by_its_name_or_at_its_agent_and_has_to_prove_its_name() {
    for (keys, agent, node) in [
        ("", "attic", Some("attic")),
        ("agent = '10.0.0.2:99'\n", "10.0.0.2:99", Some("attic")),
        ("agent = '10.0.0.2'\ninsecure = true\n", "10.0.0.2", None),
    ] {
        let text = format!("{HEAD}[cpu]\ncount = 2\n[[cpu.place]]\nnode = 'attic'\ncount = 1\n{keys}");
        let guest = Guest::parse(Path::new("g.toml"), &text).expect("valid");
        let peer = Peer::from(&guest.cpu.place[0]);
        assert_eq!((peer.agent, peer.node), (agent, node));
    }
}
