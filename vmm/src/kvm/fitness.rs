pub enum Fitness {}
pub fn fitness() {}
