//! Changes that are followed while they happen, through the kernel's notifications.

use tokio::time::timeout;

use super::*;

const SOON: Duration = Duration::from_secs(10);

struct Following {
    case: Case,
    events: mpsc::Receiver<Event>,
}

impl Following {
    async fn start(files: &[(&str, &str)], single: Option<&str>) -> Self {
        let case = Case::new(files);
        let path = single.map_or(case.dir.path().to_owned(), |name| case.path(name));
        let (sender, events) = mpsc::channel(64);
        tokio::spawn(Manifests::new(path, "node-1".into()).run(sender));
        let mut this = Self { case, events };
        while this.next().await != Event::Listed(Kind::Node) {}
        this
    }

    async fn next(&mut self) -> Event {
        timeout(SOON, self.events.recv()).await.expect("an event comes").unwrap()
    }

    /// The next event is the only one, and this Service.
    async fn expect(&mut self, port: u16) {
        let event = self.next().await;
        assert_eq!(port_of(&event), port);
    }
}

#[tokio::test]
async fn changes_of_a_directory_are_followed() {
    let mut f = Following::start(&[("web.yaml", &web("web", 80))], None).await;
    // Replaced, rewritten in place, and removed.
    f.case.write("web.yaml", web("web", 81));
    f.expect(81).await;
    fs::write(f.case.path("web.yaml"), web("web", 82)).unwrap();
    f.expect(82).await;
    f.case.write("new.yml", web("new", 83));
    f.expect(83).await;
    f.case.remove("web.yaml");
    assert_eq!(names(&[f.next().await]), ["-web"]);
}

#[tokio::test]
async fn a_file_that_is_being_written_is_not_read_half() {
    use std::io::Write as _;
    let mut f = Following::start(&[("web.yaml", &web("web", 80))], None).await;
    let text = web("web", 81) + "---\n" + &web("other", 82);
    let (half, rest) = text.split_at(web("web", 81).len());
    let mut file = fs::File::create(f.case.path("web.yaml")).unwrap();
    file.write_all(half.as_bytes()).unwrap();
    file.flush().unwrap();
    // Longer than the quiet that is waited for, shorter than the patience with a writer.
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert!(f.events.try_recv().is_err(), "read while it was open");
    file.write_all(rest.as_bytes()).unwrap();
    drop(file);
    let both = [f.next().await, f.next().await];
    assert_eq!(names(&both), ["+other", "+web"]);
}

#[tokio::test]
async fn a_config_map_in_use_is_followed() {
    let mut f = Following::start(&[], None).await;
    for number in 0..3 {
        let dir = f.case.path(&format!("..{number}"));
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("web.yaml"), web("web", 80 + number)).unwrap();
        symlink(format!("..{number}"), f.case.path("..data_tmp")).unwrap();
        fs::rename(f.case.path("..data_tmp"), f.case.path("..data")).unwrap();
        if number == 0 {
            symlink("..data/web.yaml", f.case.path("web.yaml")).unwrap();
        }
        f.expect((80 + number).try_into().unwrap()).await;
    }
}

#[tokio::test]
async fn a_directory_that_comes_back_is_followed_again() {
    let mut f = Following::start(&[("web.yaml", &web("web", 80))], None).await;
    let dir = f.case.dir.path().to_owned();
    fs::remove_dir_all(&dir).unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(f.events.try_recv().is_err(), "what was in force stays");
    fs::create_dir(&dir).unwrap();
    f.case.write("web.yaml", web("web", 81));
    // The new directory may be seen before its file.
    let mut event = f.next().await;
    if names(std::slice::from_ref(&event)) == ["-web"] {
        event = f.next().await;
    }
    assert_eq!(port_of(&event), 81);
    f.case.write("web.yaml", web("web", 82));
    f.expect(82).await;
}

#[tokio::test]
async fn a_single_file_is_followed() {
    let mut f = Following::start(&[("web", &web("web", 80))], Some("web")).await;
    f.case.write("web", web("web", 81));
    f.expect(81).await;
    f.case.remove("web");
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(f.events.try_recv().is_err(), "what was in force stays");
    f.case.write("web", web("web", 82));
    f.expect(82).await;
}
