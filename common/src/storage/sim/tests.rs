use proptest::prelude::*;

use super::*;

fn rng(seed: u64) -> Pcg64Mcg {
    Pcg64Mcg::seed_from_u64(seed)
}

fn durable_file(sim: &SimStorage, name: &str, bytes: &[u8]) -> Arc<dyn StorageFile> {
    let file = sim.open(name, OpenMode::CreateNew).unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file.sync_data().unwrap();
    sim.sync_dir("").unwrap();
    file
}

#[test]
fn unsynced_sectors_survive_in_every_combination_and_whole() {
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..500 {
        let sim = SimStorage::new(seed);
        let file = durable_file(&sim, "f", &[1; 2048]);
        file.write_all_at(&[2; 1536], 256).unwrap();
        sim.crash(&mut rng(seed));
        let bytes = sim.read_all("f").unwrap();
        assert!(bytes[..256].iter().all(|b| *b == 1));
        let sectors = [&bytes[256..512], &bytes[512..1024], &bytes[1024..1536], &bytes[1536..1792]];
        for sector in sectors {
            assert!(sector.iter().all(|b| *b == sector[0]), "a sector is atomic");
        }
        seen.insert(sectors.map(|s| s[0]));
        assert_eq!(file.len().unwrap_err().to_string(), "crashed", "old handles are dead");
    }
    assert_eq!(seen.len(), 16);
}

#[test]
fn a_sync_covers_its_own_file_only() {
    let mut lost = false;
    for seed in 0..50 {
        let sim = SimStorage::new(seed);
        let (a, b) = (durable_file(&sim, "a", &[0; 512]), durable_file(&sim, "b", &[0; 512]));
        a.write_all_at(&[1; 512], 0).unwrap();
        b.write_all_at(&[1; 512], 0).unwrap();
        a.sync_data().unwrap();
        sim.crash(&mut rng(seed));
        assert_eq!(sim.read_all("a").unwrap(), [1; 512]);
        lost |= sim.read_all("b").unwrap() == [0; 512];
    }
    assert!(lost);
}

#[test]
fn a_name_needs_its_directory_synced() {
    let (mut absent, mut old_name, mut new_name, mut dir_lost) = (false, false, false, false);
    for seed in 0..100 {
        let sim = SimStorage::new(seed);
        durable_file(&sim, "a", b"one");
        sim.rename("a", "b").unwrap();
        let file = sim.open("c", OpenMode::CreateNew).unwrap();
        file.sync_data().unwrap();
        sim.create_dir("d").unwrap();
        sim.open("d/x", OpenMode::CreateNew).unwrap();
        sim.sync_dir("d").unwrap();
        sim.crash(&mut rng(seed));
        let names = sim.list("").unwrap();
        assert_eq!(names.iter().filter(|n| *n != "c").count(), 1, "a rename is atomic");
        old_name |= names.contains(&"a".to_owned());
        new_name |= names.contains(&"b".to_owned());
        absent |= !names.contains(&"c".to_owned());
        dir_lost |= sim.list("d").unwrap().is_empty();
        assert!(sim.open("e/x", OpenMode::OrCreate).is_err(), "no such directory");
    }
    assert!(absent && old_name && new_name && dir_lost);
}

#[test]
fn a_failed_sync_is_not_saved_by_a_later_one() {
    let mut lost = false;
    for seed in 0..50 {
        let sim = SimStorage::new(seed);
        let file = durable_file(&sim, "f", &[1; 1024]);
        file.write_all_at(&[2; 512], 0).unwrap();
        sim.fail_nth(OpKind::Sync, 1, Fault::EIO);
        assert_eq!(file.sync_data().unwrap_err().raw_os_error(), Some(5));
        assert_eq!(sim.read_all("f").unwrap()[0], 2, "the cache still shows it");
        file.write_all_at(&[3; 512], 512).unwrap();
        file.sync_data().unwrap();
        sim.crash(&mut rng(seed));
        let bytes = sim.read_all("f").unwrap();
        assert_eq!(bytes[512], 3);
        lost |= bytes[0] == 1;
    }
    assert!(lost);
}

#[test]
fn a_planned_crash_stops_everything_until_the_reboot() {
    let sim = SimStorage::new(1);
    let file = durable_file(&sim, "f", &[1; 4096]);
    let before = sim.ops();
    sim.crash_after(2);
    file.write_all_at(&[2; 512], 0).unwrap();
    assert!(!sim.has_crashed());
    assert_eq!(file.write_all_at(&[2; 512], 0).unwrap_err().to_string(), "crashed");
    assert!(sim.has_crashed() && file.read_exact_at(&mut [0], 0).is_err() && sim.list("").is_err());
    assert!(sim.open("f", OpenMode::Existing).is_err() && sim.sync_dir("").is_err());
    assert_eq!(sim.ops(), before + 2);
    sim.crash(&mut rng(1));
    sim.open("f", OpenMode::Existing).unwrap().write_all_at(&[4], 0).unwrap();
}

#[test]
fn planned_faults_hit_once_and_space_ends() {
    let sim = SimStorage::new(1);
    let file = durable_file(&sim, "f", &[1; 4096]);
    sim.fail_nth(OpKind::Write, 2, io::ErrorKind::TimedOut);
    file.write_all_at(&[1], 0).unwrap();
    assert_eq!(file.write_all_at(&[1], 0).unwrap_err().kind(), io::ErrorKind::TimedOut);
    file.write_all_at(&[1], 0).unwrap();
    sim.fail_reads("f", 100..101);
    assert!(file.read_exact_at(&mut [0; 101], 0).is_err() && file.read_exact_at(&mut [0; 100], 0).is_ok());
    sim.clear_faults();
    sim.set_capacity(8192);
    file.allocate(0, 8192).unwrap();
    assert_eq!(file.write_all_at(&[1], 8192).unwrap_err().raw_os_error(), Some(28));
    file.write_all_at(&[1; 8192], 0).unwrap();
    file.set_len(1 << 40).unwrap();
    sim.corrupt("f", 5, 0x80);
    let mut byte = [0];
    file.read_exact_at(&mut byte, 5).unwrap();
    assert_eq!(byte, [0x81]);
    assert!(sim.open("f", OpenMode::ReadOnly).unwrap().write_all_at(&[1], 0).is_err());
}

#[test]
fn a_fork_is_independent() {
    let sim = SimStorage::new(1);
    let file = durable_file(&sim, "f", &[1; 100]);
    file.write_all_at(&[2; 100], 0).unwrap();
    let fork = sim.fork();
    file.write_all_at(&[3; 100], 0).unwrap();
    assert_eq!(fork.read_all("f").unwrap(), [2; 100]);
    fork.open("f", OpenMode::Existing).unwrap().sync_data().unwrap();
    fork.crash(&mut rng(1));
    assert_eq!(fork.read_all("f").unwrap(), [2; 100]);
    assert_eq!(sim.read_all("f").unwrap(), [3; 100]);
}

#[derive(Debug, Clone)]
enum Step {
    Write(u64, usize, u8),
    Zeros(u64, u64),
    Len(u64),
    Allocate(u64, u64),
    Sync,
    Crash,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let at = 0..12_000u64;
    let step = prop_oneof![
        6 => (at.clone(), 1..6000usize, 1..=255u8).prop_map(|(o, n, b)| Step::Write(o, n, b)),
        2 => (at.clone(), 0..9000u64).prop_map(|(o, n)| Step::Zeros(o, n)),
        2 => at.clone().prop_map(Step::Len),
        1 => (at, 0..6000u64).prop_map(|(o, n)| Step::Allocate(o, n)),
        2 => Just(Step::Sync),
        2 => Just(Step::Crash),
    ];
    prop::collection::vec(step, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Against a plain vector and, for crashes, the values each byte had since the last sync.
    #[test]
    fn agrees_with_a_naive_model(steps in steps(), seed: u64) {
        let sim = SimStorage::new(seed);
        let mut rng = rng(seed);
        let mut file = durable_file(&sim, "f", &[]);
        let mut model: Vec<u8> = Vec::new();
        let mut history = vec![model.clone()];
        for step in steps {
            match step {
                Step::Write(at, n, byte) => {
                    let at_index = usize::try_from(at).unwrap();
                    // Each byte its own value, so that a shifted copy shows.
                    let bytes: Vec<u8> = (0..n).map(|i| byte ^ i.to_le_bytes()[0]).collect();
                    let (a, b) = bytes.split_at(n / 3);
                    // A crash may also find the length that the first buffer gave.
                    for end in [a.len(), n].into_iter().filter(|end| *end > 0) {
                        model.resize(model.len().max(at_index + end), 0);
                        model[at_index..at_index + end].copy_from_slice(&bytes[..end]);
                        history.push(model.clone());
                    }
                    file.write_vectored_at(&mut [IoSlice::new(a), IoSlice::new(b)], at).unwrap();
                }
                Step::Zeros(at, n) => {
                    file.write_zeros(at, n).unwrap();
                    let (from, to) = (usize::try_from(at).unwrap(), usize::try_from(at + n).unwrap());
                    if n > 0 {
                        model.resize(model.len().max(to), 0);
                        model[from..to].fill(0);
                    }
                }
                Step::Len(len) => {
                    file.set_len(len).unwrap();
                    model.resize(usize::try_from(len).unwrap(), 0);
                }
                Step::Allocate(at, n) => {
                    file.allocate(at, n).unwrap();
                    if n > 0 {
                        model.resize(model.len().max(usize::try_from(at + n).unwrap()), 0);
                    }
                }
                Step::Sync => {
                    file.sync_data().unwrap();
                    history.clear();
                }
                Step::Crash => {
                    sim.crash(&mut rng);
                    file = sim.open("f", OpenMode::Existing).unwrap();
                    model = sim.read_all("f").unwrap();
                    prop_assert!(history.iter().any(|h| h.len() == model.len()), "length {}", model.len());
                    for (i, byte) in model.iter().enumerate() {
                        let was = |h: &Vec<u8>| h.get(i).copied().unwrap_or(0) == *byte;
                        prop_assert!(*byte == 0 || history.iter().any(was), "byte {i} is {byte}");
                    }
                    if let [only] = &history[..] {
                        prop_assert_eq!(&model, only);
                    }
                    history.clear();
                }
            }
            prop_assert_eq!(&sim.read_all("f").unwrap(), &model);
            history.push(model.clone());
        }
    }
}
